"""Actions on the page during a reply: they run one at a time, and nothing is lost or misplaced."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")

# Each request and its answer take 40 to 240 ms: what the page does at once no longer ends in the order in
# which it began.
SLOW_NETWORK = """
  let at = 1;
  const pause = () => new Promise((done) => setTimeout(done, 20 + (at = (at * 75 + 74) % 65537) % 100));
  const quick = window.fetch;
  window.fetch = async (...request) => {
    await pause();
    const answer = await quick(...request);
    await pause();
    return answer;
  };
"""
SLOW_BEGIN = """
  const quick = window.fetch;
  window.fetch = async (...request) => {
    if (performance.now() < 3000) await new Promise((done) => setTimeout(done, 2000));
    return quick(...request);
  };
"""


def test_a_message_from_before_the_page_has_opened(site: Any, visit: Any) -> None:
    """The browser's data arrives late and does not replace the message."""
    visitor = visit(site, script=SLOW_BEGIN, opened=False)
    visitor.say("Who are you?")
    visitor.until_answered(1)
    assert visitor.said("user") == ["Who are you?"]
    visitor.page.wait_for_timeout(2000)
    assert visitor.said("user") == visitor.conversations() == ["Who are you?"]


def test_changing_the_conversation_ends_its_reply(storyteller: Any, visit: Any) -> None:
    server = storyteller
    visitor = visit(server)
    visitor.say("A very long story")
    visitor.until_telling(server)
    visitor.page.locator("#new").click()
    server.until(server.idle)
    sync_api.expect(visitor.page.locator("#chat [data-testid=user]")).to_have_count(0)
    time.sleep(0.5)
    assert visitor.said("user") == []
    visitor.page.locator("#conversations label").first.click()
    sync_api.expect(visitor.page.locator("#chat [data-testid=user]")).to_have_text("A very long story")
    assert len(visitor.said("bot")[0]) > 20


def leave(visitor: Any) -> None:
    visitor.page.locator("#new").click()


def choose(visitor: Any) -> None:
    visitor.page.locator("#conversations label").nth(1).click()


def delete(visitor: Any) -> None:
    visitor.page.locator("#delete").click()
    visitor.page.locator("#delete-surely").click()


def clear(visitor: Any) -> None:
    visitor.page.get_by_label("Clear").click()


def speak_chinese(visitor: Any) -> None:
    visitor.page.get_by_text("中文", exact=True).click()
    sync_api.expect(visitor.page.locator("#new")).to_have_text("新对话")


@pytest.mark.parametrize(
    ("action", "shown", "listed"),
    [
        (leave, [], ["A long story", "First question"]),
        (choose, ["First question"], ["First question", "A long story"]),
        (delete, [], ["First question"]),
        (clear, [], ["A long story", "First question"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_leaving_a_reply(
    storyteller: Any, visit: Any, action: Callable[[Any], None], shown: list[str], listed: list[str]
) -> None:
    """Its last text reaches neither the next conversation nor the browser's storage."""
    visitor = two_conversations(storyteller, visit)
    action(visitor)
    sync_api.expect(visitor.page.locator("#chat [data-testid=user]")).to_have_text(shown)
    storyteller.until(lambda: storyteller.idle() and visitor.settled())
    assert visitor.said("user") == shown
    assert sorted(visitor.conversations()) == sorted(listed)
    visitor.say("And another one")
    visitor.until_telling(storyteller, len(shown) + 1)
    visitor.end()
    storyteller.until(lambda: storyteller.idle() and visitor.settled())
    assert visitor.said("user") == [*shown, "And another one"]
    again = visit.again(visitor, storyteller)
    sync_api.expect(again.page.locator("#chat [data-testid=user]")).to_have_text([*shown, "And another one"])
    assert again.said("bot") == visitor.said("bot")
    assert again.conversations() == (listed if shown else ["And another one", *listed])


def test_every_action_waits_for_the_one_before(storyteller: Any, visit: Any) -> None:
    """A message during a reply, a retry, an edited message, another language."""
    visitor = two_conversations(storyteller, visit)
    visitor.say("Another")
    time.sleep(0.5)
    assert visitor.said("user") == ["A long story"]
    visitor.end()
    visitor.until_telling(storyteller, 2)
    assert visitor.said("user") == ["A long story", "Another"]

    before = visitor.said("bot")
    visitor.page.get_by_label("Retry").last.dispatch_event("click")
    speak_chinese(visitor)
    storyteller.until(lambda: not "".join(visitor.said("bot")).startswith("".join(before)))
    visitor.until_telling(storyteller, 2)
    assert visitor.said("user") == ["A long story", "Another"]
    assert visitor.said("bot")[0] == before[0]

    visitor.page.get_by_label("Edit").first.dispatch_event("click")
    visitor.page.locator("#chat textarea").fill("A short story")
    visitor.page.get_by_label("Submit").dispatch_event("click")
    sync_api.expect(visitor.page.locator("#chat [data-testid=user]")).to_have_text(["A short story"])
    visitor.until_telling(storyteller, 1)
    visitor.end()
    storyteller.until(lambda: storyteller.idle() and visitor.settled())
    again = visit.again(visitor, storyteller)
    sync_api.expect(again.page.locator("#chat [data-testid=user]")).to_have_text(["A short story"])
    assert again.said("bot") == visitor.said("bot")
    assert again.conversations() == ["A short story", "First question"]
    assert again.page.locator("#new").inner_text() == "新对话"


def two_conversations(server: Any, visit: Any) -> Any:
    """On a slow network: a stored conversation, and one with a running reply."""
    visitor = visit(server, script=SLOW_NETWORK)
    visitor.say("First question")
    visitor.until_telling(server)
    visitor.end()
    server.until(lambda: server.idle() and visitor.settled())
    visitor.page.locator("#new").click()
    sync_api.expect(visitor.page.locator("#chat [data-testid=user]")).to_have_count(0)
    visitor.say("A long story")
    visitor.until_telling(server)
    return visitor
