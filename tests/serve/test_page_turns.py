"""A conversation always goes on: during a reply, after an end, an error, a restart, beyond the context."""

from __future__ import annotations

import time
from typing import Any

import pytest

pytestmark = pytest.mark.slow

sync_api = pytest.importorskip("playwright.sync_api")


def test_stop_keeps_what_was_said_and_continue_goes_on(storyteller: Any, visit: Any) -> None:
    server = storyteller
    visitor = visit(server)
    visitor.say("Tell me a very long story.")
    first = visitor.until_telling(server)
    server.until(lambda: visitor.said("assistant")[0] != first)  # it grows
    visitor.end()
    server.until(server.idle)
    half = visitor.until_answered(1)
    time.sleep(0.3)
    assert visitor.said("assistant") == [half]
    sync_api.expect(visitor.page.get_by_text("Stopped.").first).to_be_visible()
    sync_api.expect(visitor.page.locator("#meter")).to_contain_text("/ 8,192")
    again = visit.again(visitor, server)
    assert again.said("assistant") == [half]  # it was stored
    again.page.get_by_role("button", name="Continue").first.click()
    server.until(lambda: len(again.said("assistant")[0]) > len(half) + 20)
    again.page.keyboard.press("Escape")
    server.until(server.idle)
    assert again.until_answered(1).startswith(half)


def test_replies_go_on_in_the_background(storyteller: Any, visit: Any) -> None:
    """Each text arrives in its own conversation; deleting one ends its reply."""
    server = storyteller
    visitor = visit(server)
    visitor.say("First question")
    visitor.until_telling(server)
    visitor.say("ignored while the reply runs")
    assert visitor.said("user") == ["First question"]
    visitor.page.locator("#new").click()
    assert visitor.page.locator("#message").input_value() == "ignored while the reply runs"
    visitor.say("Second question")
    visitor.until_telling(server)
    assert visitor.said("user") == ["Second question"]
    server.until(lambda: server.service.runner.stats.running == 2)
    visitor.page.locator("#conversations .open", has_text="First").click()
    assert visitor.said("user") == ["First question"]
    begun = visitor.until_telling(server)
    server.until(lambda: len(visitor.said("assistant")[0]) > len(begun))
    visitor.page.locator("#language").click()
    visitor.page.locator("#language").click()
    visitor.choose("Delete", visitor.conversations().index("First question"))
    server.until(lambda: server.service.runner.stats.running == 1)
    visitor.page.wait_for_timeout(2500)
    visitor.page.close()  # a window that closes ends its replies; their text was stored
    server.until(server.idle)
    again = visit.again(visitor, server)
    assert again.conversations() == ["Second question"]
    again.page.locator("#conversations .open").click()
    assert len(again.said("assistant")[0]) > 20


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


def test_beyond_the_context(launch: Any, visit: Any) -> None:
    """The oldest turns are left out, with a line; a message that is too long is refused and can be edited."""
    server = launch(page="chat")
    small = type("Small", (type(server.service),), {"context": 512})  # long prompts would take long
    server.service.__class__ = small
    visitor = visit(server)
    page = visitor.page
    visitor.load([("user", "Hello"), ("assistant", "Hi!")])
    long = "word " * 600
    visitor.say(long)
    count = server.client().post("/tokenize", json={"text": long}).json()["count"]
    sync_api.expect(page.locator(".note.error")).to_contain_text(f"has {count:,} tokens", timeout=30_000)
    visitor.say("What is your name?")
    assert "XVERSE-nano" in visitor.until_answered(3)
    assert page.locator(".left-out").count() == 0  # the long one was never sent
    for number in (4, 5):
        visitor.say(f"{number} " + "word " * 100)
        visitor.until_answered(number)
    sync_api.expect(page.locator(".left-out")).to_have_count(1)
    assert page.locator(".note.error").count() == 1
    page.get_by_label("Edit").nth(1).click()
    page.locator("article textarea").fill("Who are you?")
    page.locator("article").get_by_role("button", name="Send").click()
    assert "XVERSE-nano" in visitor.until_answered(2)


def test_unanswered_turns(site: Any, visit: Any) -> None:
    """Two messages in a row, empty replies: what is sent is a conversation that the API takes."""
    visitor = visit(site, locale="zh-CN")
    sent: list[Any] = []
    visitor.page.on(
        "request", lambda request: sent.append(request.post_data_json) if "/v1/" in request.url else None
    )
    visitor.load(
        [
            ("assistant", "Hello!"),
            ("user", ""),
            ("user", "a"),
            ("user", "b"),
            ("assistant", ""),
            ("user", "c"),
            ("assistant", "d"),
            ("assistant", "e"),
        ]
    )
    visitor.say("你是谁？")
    visitor.until_answered(5)
    assert visitor.page.locator(".note.error").count() == 0
    assert [(each["role"], each["content"]) for each in sent[-1]["messages"]] == [
        ("assistant", "Hello!"),
        ("user", "a\n\nb\n\nc"),
        ("assistant", "d\n\ne"),
        ("user", "你是谁？"),
    ]


def test_errors_are_in_the_language_of_the_page_and_end_with_a_retry(launch: Any, visit: Any) -> None:
    """A full queue, a server that is away, and its return on the same address."""
    server = launch(page="chat")
    visitor = visit(server, locale="zh-CN")
    page = visitor.page
    runner = server.service.runner
    runner.open += 1000
    visitor.say("你是谁？")
    error = page.locator(".note.error")
    sync_api.expect(error).to_contain_text("服务器繁忙")
    page.locator("#language").click()
    sync_api.expect(error).to_contain_text("The server is busy")
    page.locator("#language").click()
    runner.open -= 1000
    page.context.set_offline(True)
    page.get_by_role("button", name="重试").click()
    sync_api.expect(error).to_contain_text("无法连接服务器")
    page.context.set_offline(False)
    page.get_by_role("button", name="重试").click()
    sync_api.expect(error).to_have_count(0, timeout=30_000)
    assert "XVERSE" in visitor.until_answered(1)
    assert page.get_by_text("1/").count() == 0  # the failed attempts are no versions


DAMAGE = """
  localStorage.setItem("xverse.settings", "[{broken");
  localStorage.setItem("xverse.language", "tlh");
  localStorage.setItem("xverse.theme", "{}");
  localStorage.setItem("xverse.open", "nothing");
"""
RECORDS = """async () => {
  const opened = indexedDB.open(`xverse ${location.pathname}`, 1);
  const database = await new Promise((done) => { opened.onsuccess = () => done(opened.result); });
  const table = database.transaction("conversations", "readwrite").objectStore("conversations");
  const node = {id: "n", parent: "n", role: "user", text: "a circle", state: 7, time: "x"};
  table.put({id: "1"});
  table.put({id: "2", nodes: 5, title: {}});
  table.put({id: "3", nodes: {n: node, m: {id: "m", parent: "gone", role: "tool", text: 4}}, leaf: "gone"});
  await new Promise((done) => { table.transaction.oncomplete = done; });
}"""


def test_damaged_storage(site: Any, visit: Any) -> None:
    visitor = visit(site, script=DAMAGE)
    visitor.page.evaluate(RECORDS)
    again = visit.again(visitor, site)
    assert again.conversations() == ["a circle"]
    sync_api.expect(again.page.get_by_text("could not be read: 2")).to_be_visible()
    again.page.locator("#conversations .open").click()
    again.say("Go on")
    again.until_answered(1)


def test_no_storage_at_all(site: Any, visit: Any) -> None:
    script = """
      for (const name of ["indexedDB", "localStorage"])
        Object.defineProperty(window, name, {get() { throw new DOMException("no", "SecurityError"); }});
    """
    visitor = visit(site, script=script)
    sync_api.expect(visitor.page.get_by_text("does not keep data")).to_be_visible()
    visitor.say("What is your name?")
    assert visitor.until_answered(1)


def test_under_a_path(launch: Any, visit: Any) -> None:
    """All addresses of the page are relative."""
    server = launch(page="chat")
    inner = server.server.config.loaded_app

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"].removeprefix("/xv") if scope["path"].startswith("/xv/") else "/v1/nothing"
        await inner({**scope, "path": path}, receive, send)

    server.server.config.loaded_app = outer
    server.url += "/xv/"
    visitor = visit(server)
    visitor.say("What is your name?")
    assert visitor.until_answered(1)
    assert all("/xv/" in url for url in visitor.asked)
