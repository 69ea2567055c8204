"""The web page in a real browser (Debian's chromium), against a real server with the embedded model.

With ``XVERSE_SCREENSHOTS=FOLDER`` it writes the pictures of the README there.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

sync_api = pytest.importorskip("playwright.sync_api")

PHONE = {"width": 390, "height": 844}
NO_SIDEWAYS = "document.documentElement.scrollWidth <= window.innerWidth"


def test_a_conversation_in_chinese(site: Any, visit: Any) -> None:
    visitor = visit(site, locale="zh-CN")
    assert visitor.page.locator("#new").inner_text().strip() == "新对话"
    assert visitor.page.locator("#model").inner_text() == "nano"
    visitor.say("你好，你是谁？")
    assert "XVERSE-nano" in visitor.until_answered(1)
    assert visitor.said("user") == ["你好，你是谁？"]
    assert re.match(r"\d+ 个词元", visitor.page.locator("#status").inner_text())
    assert re.match(r"\d+ / 8,192", visitor.page.locator("#meter").inner_text())
    visitor.say("25加37等于多少？")
    visitor.until_answered(2)
    visitor.picture("chat-zh")
    assert visitor.conversations() == ["你好，你是谁？"]


def test_it_says_what_the_api_says(site: Any, visit: Any) -> None:
    """The system prompt and the settings reach the model, and so does the whole conversation."""
    visitor = visit(site)
    visitor.page.locator("#open-settings").click()
    visitor.page.locator("#system").fill("You are a pirate.")
    visitor.page.locator("#param-max_tokens").fill("12")
    visitor.page.locator("#param-repetition_penalty").fill("1000")
    assert "out of range" in visitor.page.locator(".control .error:not(:empty)").inner_text()
    visitor.page.locator("#param-repetition_penalty").fill("1.3")
    messages = [{"role": "system", "content": "You are a pirate."}]
    for count, text in enumerate(("What is your name?", "Tell me about the sea."), 1):
        visitor.say(text)
        shown = visitor.until_answered(count)
        messages.append({"role": "user", "content": text})
        reply = site.openai().chat.completions.create(
            model="nano", messages=messages, max_tokens=12, extra_body={"repetition_penalty": 1.3}
        )
        content = reply.choices[0].message.content
        assert " ".join(shown.split()) == " ".join(content.split())
        messages.append({"role": "assistant", "content": content})


def test_regenerate_and_edit_keep_the_versions(site: Any, visit: Any) -> None:
    visitor = visit(site)
    visitor.say("What is your name?")
    first = visitor.until_answered(1)
    visitor.say("Write a function that reverses a string.")
    visitor.until_answered(2)
    visitor.picture("chat-en")
    visitor.page.get_by_label("Regenerate").last.click()
    sync_api.expect(visitor.page.get_by_text("2/2")).to_be_visible()
    visitor.until_answered(2)
    assert visitor.said("user") == ["What is your name?", "Write a function that reverses a string."]

    visitor.page.get_by_label("Edit").first.click()
    visitor.page.locator("article textarea").fill("Who are you?")
    visitor.page.locator("article").get_by_role("button", name="Send").click()
    visitor.until_answered(1)
    assert visitor.said("user") == ["Who are you?"]
    visitor.page.get_by_label("Previous version").first.click()
    assert visitor.said("user") == ["What is your name?", "Write a function that reverses a string."]
    assert visitor.said("assistant")[0] == first
    again = visit.again(visitor, site)
    assert again.said("user") == ["What is your name?", "Write a function that reverses a string."]
    assert again.page.get_by_text("2/2").count() == 1


def test_the_list_of_conversations(site: Any, visit: Any) -> None:
    visitor = visit(site)
    visitor.say("First question")
    first = visitor.until_answered(1)
    visitor.page.locator("#new").click()
    assert visitor.said("user") == []
    visitor.say("Second question")
    visitor.until_answered(1)
    assert visitor.conversations() == ["Second question", "First question"]
    visitor.page.locator("#conversations .open").nth(1).click()
    assert visitor.said("user") == ["First question"]

    again = visit.again(visitor, site)
    assert again.said("user") == ["First question"]
    assert again.said("assistant") == [first]
    again.choose("Rename", 1)
    again.page.locator("#conversations input").fill("<b>Übung</b>")
    again.page.locator("#conversations input").press("Enter")
    assert again.conversations() == ["Second question", "<b>Übung</b>"]
    again.page.locator("#search").fill("übung")
    assert again.conversations() == ["<b>Übung</b>"]
    again.page.locator("#search").fill("SECOND question")  # also in messages
    assert again.conversations() == ["Second question"]
    again.page.locator("#search").fill("")
    again.choose("Delete", 1)
    assert again.conversations() == ["Second question"]
    again.page.get_by_role("button", name="Undo").first.click()
    assert len(again.conversations()) == 2
    again.choose("Delete", 1)
    third = visit.again(again, site)
    assert third.conversations() == ["Second question"]
    # Another browser does not have it.
    assert visit(site).conversations() == []


def test_export_and_import(site: Any, visit: Any, tmp_path: Path) -> None:
    visitor = visit(site)
    visitor.load(
        [("system", "Be kind."), ("user", "Hi <b>"), ("assistant", "**Hello**"), ("user", "1"), ("user", "2")]
    )
    assert visitor.said("user") == ["Hi <b>", "1", "2"]
    assert visitor.said("assistant") == ["Hello"]
    for action, name in (("Markdown", "c.md"), ("JSON", "c.json")):
        with visitor.page.expect_download() as download:
            visitor.choose(action)
        download.value.save_as(tmp_path / name)
    text = (tmp_path / "c.md").read_text(encoding="utf-8")
    assert [part in text for part in ("# Hi <b>", "Be kind.", "**Hello**")] == [True] * 3
    exported = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert len(exported["conversations"][0]["nodes"]) == 4
    with visitor.page.expect_file_chooser() as chooser:
        visitor.page.locator("#import").click()
    chooser.value.set_files(tmp_path / "c.json")
    sync_api.expect(visitor.page.locator("#conversations .open")).to_have_count(2)
    (tmp_path / "bad.json").write_text('{"messages": 3}')
    with visitor.page.expect_file_chooser() as chooser:
        visitor.page.locator("#import").click()
    chooser.value.set_files(tmp_path / "bad.json")
    sync_api.expect(visitor.page.get_by_text("bad.json has no conversations")).to_be_visible()
    foreign: list[Any] = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "In "}, {"type": "text", "text": "parts"}]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": ["Five"]},
    ]
    (tmp_path / "foreign.json").write_text(json.dumps([{"messages": foreign}, {"title": "no messages"}]))
    with visitor.page.expect_file_chooser() as chooser:
        visitor.page.locator("#import").click()
    chooser.value.set_files(tmp_path / "foreign.json")
    sync_api.expect(visitor.page.get_by_text("conversations: 1. Left out: 3 entries")).to_be_visible()
    visitor.page.locator("#conversations .open", has_text="In parts").click()
    sync_api.expect(visitor.page.get_by_text("Five")).to_be_visible()


@pytest.mark.parametrize("chinese", [True, False])
def test_examples_and_languages(site: Any, visit: Any, chinese: bool) -> None:
    visitor = visit(site, locale="zh-CN" if chinese else "fr-FR")
    page = visitor.page
    examples = page.locator("#examples button")
    assert examples.count() == 9
    assert examples.nth(1).inner_text().startswith("知识问答" if chinese else "Knowledge")
    page.locator("#language").click()
    sync_api.expect(page.locator("#new")).to_have_text("New conversation" if chinese else "新对话")
    sync_api.expect(page.get_by_role("tab").nth(1)).to_have_text("Text generation" if chinese else "文本续写")
    assert page.locator("html").get_attribute("lang") == ("en" if chinese else "zh-CN")
    examples.nth(1).click()
    visitor.until_answered(1)
    assert visitor.said("user") == ["Why is the sky blue?" if chinese else "天空为什么是蓝色的？"]
    again = visit.again(visitor, site)
    sync_api.expect(again.page.locator("#new")).to_have_text("New conversation" if chinese else "新对话")


def test_both_languages_are_complete() -> None:
    text = (Path(__file__).parents[2] / "src/xverse/serve/static/texts.js").read_text(encoding="utf-8")
    english, chinese = text.split("const zh = {")
    pattern = r'^  (\w+): "(.*)",$'
    texts = [dict(re.findall(pattern, part, re.MULTILINE)) for part in (english, chinese)]
    assert texts[0].keys() == texts[1].keys()
    assert len(texts[0]) > 90
    for key, value in texts[0].items():
        assert set(re.findall(r"\{\w+\}", value)) == set(re.findall(r"\{\w+\}", texts[1][key])), key
    used = "".join(
        path.read_text(encoding="utf-8")
        for path in (Path(__file__).parents[2] / "src/xverse/serve/static").glob("*.*")
        if path.name != "texts.js"
    )
    assert [key for key in texts[0] if not re.search(rf'"{key}"', used)] == []


def test_on_a_phone(site: Any, visit: Any) -> None:
    visitor = visit(site, size=PHONE, is_mobile=True, has_touch=True)
    page = visitor.page
    assert page.evaluate(NO_SIDEWAYS)
    assert page.get_by_text("What can I help with?").is_visible()
    visitor.say("What is your name?")
    visitor.until_answered(1)
    assert page.evaluate(NO_SIDEWAYS)
    box = page.locator("#message").bounding_box()
    assert box["y"] + box["height"] <= PHONE["height"]
    page.locator("#show").click()
    head = "| Country | Capital | Inhabitants | Area | Currency | Language |\n|---|---|---:|---:|---|---|\n"
    row = "| France | Paris | 68,000,000 | 643,801 km² | Euro | French |\n"
    visitor.load(
        [("user", "x" * 500), ("assistant", head + row + "\n```\n" + "y" * 400 + "\n```\n" + "z" * 500)]
    )
    cell = page.locator("td").first
    assert cell.bounding_box()["height"] < 60  # one line of text
    assert page.locator("td").nth(2).evaluate("each => getComputedStyle(each).textAlign") == "right"
    wide = page.locator(".wide").evaluate(
        "each => [each.scrollWidth > each.clientWidth, each.clientWidth <= innerWidth]"
    )
    assert wide == [True, True]
    assert page.evaluate(NO_SIDEWAYS)
    page.locator("#open-settings").click()
    assert page.evaluate(NO_SIDEWAYS)


def test_text_generation(launch: Any, visit: Any) -> None:
    server = launch(page="generation", stop_ids=())
    visitor = visit(server)
    page = visitor.page
    text = page.locator("#text")
    sync_api.expect(text).to_be_visible()  # this tab is open first
    page.locator("#open-settings").click()
    page.locator("#param-max_tokens").fill("30")
    text.fill("Once upon a time")
    page.locator("#go-on").click()
    sync_api.expect(page.locator("#text-status")).to_contain_text("30 tokens", timeout=60_000)
    assert text.input_value().startswith("Once upon a time")
    assert len(text.input_value()) > 40
    page.locator("#undo").click()
    assert text.input_value() == "Once upon a time"
    page.locator("#param-max_tokens").fill("6000")
    page.locator("#param-temperature").fill("1.5")  # text that repeats itself is generated too fast
    page.locator("#go-on").click()
    server.until(lambda: server.service.runner.stats.running)
    page.locator("#halt").click()
    server.until(server.idle)
    text.fill("word " * 9000)
    page.locator("#go-on").click()
    sync_api.expect(page.locator("#text-status")).to_contain_text("has no room for more")


def test_a_server_with_keys_asks_for_one(launch: Any, visit: Any) -> None:
    server = launch(guard={"keys": ("secret-1", "secret-2")}, page="chat")
    with server.client() as client:
        answer = client.get("/")
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Basic ")
        assert client.get("/", auth=("anybody", "secret")).status_code == 401
        assert client.get("/page/settings").status_code == 401
    visitor = visit(server, http_credentials={"username": "me", "password": "secret-2"})
    visitor.say("What is your name?")
    assert visitor.until_answered(1)


def test_the_routes(site: Any) -> None:
    with site.client() as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "nano"
        assert client.get("/health").json() == {"status": "ready"}
        answer = client.post("/v1/nothing", json={})
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "unknown_path"
        assert client.get("/", headers={"Origin": "http://evil.example"}).status_code == 403
        # Nothing can be uploaded, and no file outside the page's own is served.
        files = {"files": ("a.txt", b"12345678")}
        for path in ("/", "/upload", "/page/upload", "/gradio_api/upload", "/page/app.js"):
            assert client.post(path, files=files).status_code in (404, 405)
        for path in ("../page.py", "..%2fpage.py", "%2e%2e/page.py", "/etc/passwd", ""):
            assert client.get(f"/page/{path}").status_code == 404
        policy = client.get("/").headers["content-security-policy"]
        assert "unsafe" not in policy
        assert "script-src 'self';" in policy
        tag = client.get("/page/app.js").headers["etag"]
        assert client.get("/page/app.js", headers={"If-None-Match": tag}).status_code == 304


def test_fitting(launch: Any) -> None:
    """Whole turns are left out, oldest first, and no more than necessary; counts are the API's."""
    server = launch(page="chat")
    small = type("Small", (type(server.service),), {"context": 1024})  # long prompts would take long
    server.service.__class__ = small
    with server.client() as client:

        def fit(*messages: tuple[str, str], **more: Any) -> dict[str, Any]:
            body = {"messages": [{"role": role, "content": text} for role, text in messages], **more}
            answer = client.post("/page/fit", json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()

        def tokens(*messages: tuple[str, str]) -> int:
            body = {"messages": [{"role": role, "content": text} for role, text in messages]}
            return client.post("/tokenize", json=body).json()["count"]

        turn = (("user", "word " * 100), ("assistant", "yes " * 70))
        system, last = ("system", "Be kind."), ("user", "and now?")
        short = (system, *turn, last)
        assert fit(*short) == {"first": 1, "tokens": tokens(*short), "max_tokens": 512}
        whole = fit(system, *turn * 9, last, max_tokens=400)
        assert whole["first"] > 1
        assert whole["first"] % 2 == 1
        kept = (system, *(turn * 9)[whole["first"] - 1 :], last)
        assert whole["tokens"] == tokens(*kept) <= 1024 - 256
        assert whole["max_tokens"] == min(400, 1024 - whole["tokens"])
        assert fit(*kept[:1], *turn, *kept[1:], max_tokens=256)["first"] == 3  # one more would be too much
        long = "word " * 1200
        count = client.post("/tokenize", json={"text": long}).json()["count"]
        answer = fit(system, *turn, ("user", long))
        assert answer["too_long"] == count
        exact = client.post("/tokenize", json={"text": "word " * 3}).json()["count"]
        assert 1024 - 300 - exact < answer["most"] < 1024
        begun = (("assistant", "Hi!"), *turn, last, ("assistant", "I am"))
        assert tokens(*begun[:-1]) < fit(*begun)["tokens"] < tokens(*begun[:-1]) + 10
        assert fit(*begun)["first"] == 0
        for wrong in (
            [],
            [{"role": "system", "content": "x"}],
            [{"role": "tool", "content": "x"}],
            [1] * 50_000,
        ):
            assert client.post("/page/fit", json={"messages": wrong}).status_code in (400, 422)
