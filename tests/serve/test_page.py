"""The web page in a real browser (Debian's chromium), against a real server with the embedded model.

With ``XVERSE_SCREENSHOTS=FOLDER`` it writes the pictures of the README there.
"""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")

PHONE = {"width": 390, "height": 844}


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
    server.until(lambda: visitor.said("bot")[0] != first)  # it grows
    stop.click()
    server.until(server.idle)
    half = visitor.until_answered(1)
    assert len(half) > 20
    time.sleep(0.3)
    assert visitor.said("bot") == [half]
    again = visit.again(visitor, server)
    assert again.until_answered(1) == half  # it was stored


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
    # Another browser does not have it.
    assert visit(site).conversations() == []


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
    """No scripts, and no images from other hosts; the fixture checks all requests."""
    visitor = visit(site)
    visitor.say(
        '<img src=x onerror="document.title=1"> <script>document.title=2</script> '
        "![](http://192.0.2.1/a.png) <img src='http://192.0.2.1/b.png'> <iframe src='http://192.0.2.1'></iframe>"
    )
    visitor.until_answered(1)
    time.sleep(0.5)
    assert visitor.page.title() == "nano"
    blocked = [url for url in visitor.asked if "192.0.2.1" in url]
    for url in blocked:  # Chromium also reports requests that the page's policy blocked
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
    sync_api.expect(text).to_be_visible()  # this tab is open first
    text.fill("Once upon a time")
    visitor.page.locator("#go-on").click()
    server.until(lambda: re.match(r"100 tokens", visitor.page.locator("#text-status").inner_text().strip()))
    assert text.input_value().startswith("Once upon a time")
    assert len(text.input_value()) > 100
    visitor.picture("generation")
    page = visitor.page
    page.get_by_text("Settings").last.click()
    number = page.get_by_label("number input for Maximum tokens").last
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
        if count == 3:  # before the answer: the notice vanishes after ten seconds
            notice = visitor.page.get_by_text("oldest messages are left out").first
            sync_api.expect(notice).to_be_visible(timeout=60_000)
        visitor.until_answered(count)
    visitor.say("word " * 9000)
    sync_api.expect(visitor.page.get_by_text("exceed the context").first).to_be_visible()
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
        # No uploads, and no access to files.
        files = {"files": ("a.txt", b"12345678")}
        assert client.post("/gradio_api/upload", files=files).status_code >= 400
        assert client.get("/gradio_api/file=/etc/passwd").status_code in (403, 404)
