"""The web page in a real browser (Debian's chromium), against a real server with the embedded model.

With ``XVERSE_SCREENSHOTS=FOLDER`` it writes the pictures of the README there.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

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
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 800}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@dataclass
class Visitor:
    """One browser window, and every address that it asked."""

    page: Any
    asked: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        box = self.page.locator("#message textarea")
        box.fill(text)
        box.press("Enter")

    def said(self, who: str) -> list[str]:
        return [each.inner_text().strip() for each in self.page.locator(f"#chat [data-testid={who}]").all()]

    def until_answered(self, replies: int) -> str:
        """The last of so many replies, when it is complete."""
        sync_api.expect(self.page.locator("#chat [data-testid=bot]")).to_have_count(replies, timeout=20_000)
        sync_api.expect(self.page.locator("#message [data-testid=submit-button]")).to_be_visible(
            timeout=20_000
        )
        return self.said("bot")[-1]

    def until_telling(self, server: Any, replies: int = 1) -> str:
        """What has been said of the last of so many replies, which goes on."""

        def begun() -> bool:
            said = self.said("bot")
            return len(said) == replies and len(said[-1]) > 20

        server.until(begun)
        return self.said("bot")[-1]

    def settled(self) -> bool:
        """Nothing that was begun is still to change the conversations."""
        return self.page.evaluate(
            """Promise.race([
              (window.xverseTurns?.last ?? Promise.resolve()).then(() => true),
              new Promise((done) => setTimeout(done, 20, false)),
            ])"""
        )

    def end(self) -> None:
        """A reply that goes on. Its text moves the page, which Playwright's own click would wait for."""
        self.page.locator("#message [data-testid=stop-button]").dispatch_event("click")

    def conversations(self) -> list[str]:
        return [each.inner_text().strip() for each in self.page.locator("#conversations label").all()]

    def picture(self, name: str) -> None:
        if os.environ.get("XVERSE_SCREENSHOTS"):
            self.page.screenshot(path=Path(os.environ["XVERSE_SCREENSHOTS"]) / f"{name}.png")


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visitor]]:
    """``visit(server)``: its page in a browser of its own. At the end nothing was asked of anybody else."""
    visitors: list[Visitor] = []
    contexts: list[Any] = []

    def open_page(
        server: Any,
        *,
        locale: str = "en-US",
        size: dict[str, int] = DESK,
        script: str = "",
        opened: bool = True,
        **more: Any,
    ) -> Visitor:
        context = browser.new_context(locale=locale, viewport=size, **more)
        context.add_init_script(script)
        context.set_default_timeout(20_000)
        contexts.append(context)
        return enter(context, server, opened)

    def enter(context: Any, server: Any, opened: bool = True) -> Visitor:
        page = context.new_page()
        visitor = Visitor(page)
        page.on("request", lambda request: visitor.asked.append(request.url))
        page.on("pageerror", lambda error: visitor.errors.append(str(error)))
        page.goto(server.url)
        page.wait_for_selector("#chat, #text")
        if opened:
            page.wait_for_function("window.xverseTurns?.last.then(() => true) ?? false")
        page.wait_for_load_state("networkidle")
        visitors.append(visitor)
        return visitor

    open_page.again = lambda visitor, server: enter(visitor.page.context, server)  # type: ignore[attr-defined]
    yield open_page
    for context in contexts:
        context.close()
    for visitor in visitors:
        assert visitor.asked
        hosts = {urlsplit(url).hostname for url in visitor.asked if not url.startswith(("data:", "blob:"))}
        assert hosts == {"127.0.0.1"}
        assert not visitor.errors


@pytest.fixture
def storyteller(nano: Any, launch: Any) -> Any:
    """A server whose replies go on until somebody ends them, at the speed of a large model: as fast as this
    one they would soon be so long that drawing them is all that the browser does."""
    endless = dataclasses.replace(nano.parameters, max_new_tokens=8000)
    server = launch(page="chat", stop_ids=(), parameters=endless)
    engine = server.service.runner.engine
    step = engine.step

    def slow_step() -> Any:
        time.sleep(0.02)
        return step()

    engine.step = slow_step
    return server


def test_a_conversation_in_chinese(site: Any, visit: Any) -> None:
    visitor = visit(site, locale="zh-CN")
    assert visitor.page.locator("#new").inner_text() == "新对话"
    visitor.say("你好，你是谁？")
    assert "XVERSE-nano" in visitor.until_answered(1)
    assert visitor.said("user") == ["你好，你是谁？"]
    assert re.match(r"\d+ 个词元", visitor.page.locator("#status").inner_text().strip())
    visitor.say("谢谢！")
    visitor.until_answered(2)
    visitor.picture("chat-zh")
    assert visitor.conversations() == ["你好，你是谁？"]


def test_a_message_from_before_the_page_has_opened(site: Any, visit: Any) -> None:
    """What the browser keeps is asked for late, and does not come in the place of the message."""
    visitor = visit(site, script=SLOW_BEGIN, opened=False)
    visitor.say("Who are you?")
    visitor.until_answered(1)
    assert visitor.said("user") == ["Who are you?"]
    visitor.page.wait_for_timeout(2000)
    assert visitor.said("user") == visitor.conversations() == ["Who are you?"]


def test_it_says_what_the_api_says(site: Any, visit: Any) -> None:
    """The system prompt and the settings reach the model, and so does the whole conversation."""
    visitor = visit(site)
    visitor.page.get_by_text("Settings").first.click()
    visitor.page.locator("#system textarea").fill("You are a pirate.")
    number = visitor.page.get_by_label("number input for Temperature").first
    number.fill("0")
    number.press("Tab")
    messages = [{"role": "system", "content": "You are a pirate."}]
    for count, text in enumerate(("What is your name?", "Tell me about the sea."), 1):
        visitor.say(text)
        shown = visitor.until_answered(count)
        messages.append({"role": "user", "content": text})
        reply = site.openai().chat.completions.create(
            model="nano", messages=messages, temperature=0, max_tokens=2048
        )
        content = reply.choices[0].message.content
        assert " ".join(shown.split()) == " ".join(content.split())
        messages.append({"role": "assistant", "content": content})


def test_stop_keeps_what_was_said(storyteller: Any, visit: Any) -> None:
    server = storyteller
    visitor = visit(server)
    visitor.say("Tell me a very long story.")
    stop = visitor.page.locator("#message [data-testid=stop-button]")
    sync_api.expect(stop).to_be_visible()
    server.until(lambda: server.service.runner.stats.running)
    server.until(lambda: visitor.said("bot") and len(visitor.said("bot")[0]) > 20)
    first = visitor.said("bot")[0]
    server.until(lambda: visitor.said("bot")[0] != first)  # it grows while one looks
    stop.click()
    server.until(server.idle)
    half = visitor.until_answered(1)
    assert len(half) > 20
    time.sleep(0.3)
    assert visitor.said("bot") == [half]
    again = visit.again(visitor, server)
    assert again.until_answered(1) == half  # it was kept


def test_regenerate_and_edit(site: Any, visit: Any) -> None:
    visitor = visit(site)
    visitor.say("What is your name?")
    visitor.until_answered(1)
    visitor.say("Write a story.")
    visitor.until_answered(2)
    visitor.picture("chat-en")
    before = site.service.runner.tokens
    visitor.page.get_by_label("Retry").click()
    site.until(lambda: site.service.runner.tokens > before)
    visitor.until_answered(2)
    assert visitor.said("user") == ["What is your name?", "Write a story."]

    visitor.page.get_by_label("Edit").first.click()
    visitor.page.locator("#chat textarea").fill("Who are you?")
    visitor.page.get_by_label("Submit").click()
    visitor.until_answered(1)
    assert visitor.said("user") == ["Who are you?"]
    assert visitor.conversations() == ["Who are you?"]


def test_several_conversations_stay_in_the_browser(site: Any, visit: Any) -> None:
    visitor = visit(site)
    visitor.say("First question")
    first = visitor.until_answered(1)
    visitor.page.locator("#new").click()
    sync_api.expect(visitor.page.locator("#chat [data-testid=user]")).to_have_count(0)
    visitor.say("Second question")
    visitor.until_answered(1)
    assert visitor.conversations() == ["Second question", "First question"]
    visitor.page.locator("#conversations label").nth(1).click()
    sync_api.expect(visitor.page.locator("#chat [data-testid=user]")).to_have_text("First question")

    again = visit.again(visitor, site)
    assert again.until_answered(1) == first
    assert again.said("user") == ["First question"]
    assert sorted(again.conversations()) == ["First question", "Second question"]
    again.page.locator("#delete").click()
    again.page.locator("#delete-surely").click()
    sync_api.expect(again.page.locator("#chat [data-testid=user]")).to_have_count(0)
    assert again.conversations() == ["Second question"]
    # Another browser knows nothing of it.
    assert visit(site).conversations() == []


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


def leave(visitor: Visitor) -> None:
    visitor.page.locator("#new").click()


def choose(visitor: Visitor) -> None:
    visitor.page.locator("#conversations label").nth(1).click()


def delete(visitor: Visitor) -> None:
    visitor.page.locator("#delete").click()
    visitor.page.locator("#delete-surely").click()


def clear(visitor: Visitor) -> None:
    visitor.page.get_by_label("Clear").click()


def speak_chinese(visitor: Visitor) -> None:
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
    storyteller: Any, visit: Any, action: Callable[[Visitor], None], shown: list[str], listed: list[str]
) -> None:
    """Its last words come neither into the next conversation nor into what the browser keeps."""
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
    """A message while another is answered, a reply once more, a rewritten message, another language."""
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


def two_conversations(server: Any, visit: Any) -> Visitor:
    """On a slow network: one that is kept, and one whose reply goes on."""
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


@pytest.mark.parametrize("chinese", [True, False])
def test_examples_and_languages(site: Any, visit: Any, chinese: bool) -> None:
    visitor = visit(site, locale="zh-CN" if chinese else "fr-FR")
    page = visitor.page
    examples = page.locator("#chat .examples button")
    assert examples.count() == 9
    skill = "知识问答" if chinese else "Knowledge"
    assert examples.nth(1).inner_text().strip() == skill
    page.get_by_text("English" if chinese else "中文", exact=True).click()
    sync_api.expect(page.locator("#new")).to_have_text("New conversation" if chinese else "新对话")
    sync_api.expect(page.get_by_role("tab").nth(1)).to_have_text("Text generation" if chinese else "文本续写")
    examples.nth(1).click()
    visitor.until_answered(1)
    assert visitor.said("user") == ["Why is the sky blue?" if chinese else "天空为什么是蓝色的？"]
    assert visit.again(visitor, site).page.locator("#new").inner_text() == (
        "New conversation" if chinese else "新对话"
    )


def test_markdown_code_and_formulas(site: Any, visit: Any) -> None:
    visitor = visit(site)
    visitor.say(
        "**bold** costs $5 or $6\n\n```python\nprint(1)\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n"
        "$$\\frac{1}{2}$$ and \\(y^2\\)"
    )
    visitor.until_answered(1)
    message = visitor.page.locator("#chat [data-testid=user]")
    assert message.locator("strong").inner_text() == "bold"
    assert "$5 or $6" in message.inner_text()
    assert message.locator("pre code .token").count() > 1
    assert message.locator("table td").count() == 2
    assert message.locator(".katex").count() == 2


def test_what_is_said_cannot_act(site: Any, visit: Any) -> None:
    """Neither scripts nor pictures from elsewhere: the fixture looks at what was asked of whom."""
    visitor = visit(site)
    visitor.say(
        '<img src=x onerror="document.title=1"> <script>document.title=2</script> '
        "![](http://192.0.2.1/a.png) <img src='http://192.0.2.1/b.png'> <iframe src='http://192.0.2.1'></iframe>"
    )
    visitor.until_answered(1)
    time.sleep(0.5)
    assert visitor.page.title() == "nano"
    blocked = [url for url in visitor.asked if "192.0.2.1" in url]
    for url in blocked:  # Chromium reports what the page's policy stopped before it was sent
        visitor.asked.remove(url)
    sizes = visitor.page.locator("#chat img").evaluate_all("all => all.map(each => each.naturalWidth)")
    assert not any(sizes)


def test_on_a_telephone(site: Any, visit: Any) -> None:
    visitor = visit(site, size=PHONE, is_mobile=True, has_touch=True)
    wide = "document.documentElement.scrollWidth <= window.innerWidth"
    assert visitor.page.evaluate(wide)
    visitor.say("What is your name?")
    visitor.until_answered(1)
    assert visitor.page.evaluate(wide)
    box = visitor.page.locator("#message textarea").bounding_box()
    assert box["y"] + box["height"] <= PHONE["height"]
    visitor.picture("chat-phone")


def test_text_generation(launch: Any, visit: Any) -> None:
    server = launch(page="generation", stop_ids=())
    visitor = visit(server)
    text = visitor.page.locator("#text textarea")
    sync_api.expect(text).to_be_visible()  # this tab comes first
    text.fill("Once upon a time")
    visitor.page.locator("#go-on").click()
    server.until(lambda: re.match(r"100 tokens", visitor.page.locator("#text-status").inner_text().strip()))
    assert text.input_value().startswith("Once upon a time")
    assert len(text.input_value()) > 100
    visitor.picture("generation")
    page = visitor.page
    page.get_by_text("Settings").last.click()
    number = page.get_by_label("number input for Longest reply, in tokens").last
    number.fill("6000")
    number.press("Tab")
    page.locator("#go-on").click()
    server.until(lambda: server.service.runner.stats.running)
    page.locator("#stop").click()
    server.until(server.idle)


def test_a_window_that_closes_ends_its_reply(storyteller: Any, visit: Any) -> None:
    server = storyteller
    visitor = visit(server)
    visitor.say("A very long story")
    visitor.until_telling(server)
    visitor.page.close()
    server.until(server.idle)


def test_a_long_conversation_loses_its_beginning(launch: Any, visit: Any) -> None:
    server = launch(page="chat")
    visitor = visit(server)
    for count in (1, 2, 3):
        visitor.say(f"{count} " + "word " * 3500)
        visitor.until_answered(count)
    sync_api.expect(visitor.page.get_by_text("oldest messages are no longer seen").first).to_be_visible()
    visitor.say("word " * 9000)
    sync_api.expect(visitor.page.get_by_text("do not fit into the context").first).to_be_visible()
    assert not visitor.errors


def test_a_server_with_keys_asks_for_one(launch: Any, browser: Any, visit: Any) -> None:
    server = launch(guard={"keys": ("secret-1", "secret-2")}, page="chat")
    with server.client() as client:
        answer = client.get("/")
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Basic ")
        assert client.get("/", auth=("anybody", "secret")).status_code == 401
        assert client.get("/gradio_api/info").status_code == 401
    visitor = visit(server, http_credentials={"username": "me", "password": "secret-2"})
    visitor.say("What is your name?")
    assert visitor.until_answered(1)


def test_many_visitors_at_once(storyteller: Any, visit: Any) -> None:
    server = storyteller
    visitors = [visit(server) for _ in range(3)]
    for visitor in visitors:
        visitor.say("A very long story")
    server.until(lambda: server.service.runner.stats.running == 3)
    for visitor in visitors:
        visitor.until_telling(server)
        visitor.end()
    server.until(server.idle)


def test_the_api_stays_beside_the_page(site: Any) -> None:
    with site.client() as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "nano"
        assert client.get("/health").json() == {"status": "ready"}
        answer = client.post("/v1/nothing", json={})
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "unknown_path"
        assert client.get("/", headers={"Origin": "http://evil.example"}).status_code == 403
        # Nothing can be uploaded, and no file read.
        files = {"files": ("a.txt", b"12345678")}
        assert client.post("/gradio_api/upload", files=files).status_code >= 400
        assert client.get("/gradio_api/file=/etc/passwd").status_code in (403, 404)
