"""Text shown is text said: hostile and odd texts in both roles, accessibility, and the weight of the page."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

sync_api = pytest.importorskip("playwright.sync_api")

STATIC = Path(__file__).parents[2] / "src/xverse/serve/static"
# Without Markdown's marks: every character of them is shown, in both roles.
VERBATIM = [
    "#include <iostream>\nint main() { std::cout << 1; }",
    "a < b && c > d, 1<2>3, x <- y, a <= b",
    "std::vector<int> List<Map<String, ?>> Vec<T> <T extends Foo>",
    "before <!-- a comment --> after <![CDATA[x]]> <?php echo 1 ?> <!DOCTYPE html>",
    "<div style='position:fixed;inset:0;background:red;z-index:99999'>Session expired</div>",
    "<form action='/logout'><input autofocus name=key><button>Send</button></form>",
    "<img src=x onerror=alert(1)> <img src='http://192.0.2.1/a.png'>",
    "<script>document.title = 1</script>",
    "<iframe src='http://192.0.2.1'></iframe><object data=x></object><embed src=x>",
    "<svg onload=alert(1)><circle r=9 /></svg> <math><mi>x</mi></math>",
    "<style>* { display: none }</style><link rel=stylesheet href='http://192.0.2.1/x.css'>",
    "<b>bold</b> <unclosed <a href='x' <p <<>> </div></body></html>",
    "<details open ontoggle=alert(1)><summary>x</summary></details>",
    "&lt;b&gt; &amp; &nbsp; &copy; &#60; &#x3c; &unknown; AT&T",
    "Jane <jane@example.org>, <http://192.0.2.1/x>, <mailto:a@b.c>",
    '<think>thoughts</think> <tool_call>{"name": "f"}</tool_call> <|endoftext|> </s> [INST]',
    "C:\\new\\[a]\\(b) \\d+\\.\\d \\<b\\> \\& a\\\\b",
    "[label]: http://192.0.2.1/x 'title'\n[^1]: a note",
    "$5 or $6, US$5-$6, $HOME and $PATH, 3$ or 4$, $1,000.00 to $2,000",
    "$5元和6元US$",
    "2*3*4 = 24, f(x)*g(y)*2, snake_case_name, __init__.py, 5 * 6 * 7",
    ">>> print(1)\n... more",
    "{{ template }} ${injection} #{ruby} <%= erb %> `unclosed",
    "javascript:alert(1) data:text/html,<script>1</script> vbscript:x",
    "[click](javascript:alert(1)) [x](data:text/html,y) [y](//192.0.2.1)",
    "مرحبا (أهلا). 1 < 2 & <b>نص</b>",
    "שלום <עולם>!",
    "你好，《书名》、<尖括号>。“引号”",
    "a\u202eb\u202c \u200b\u2066x\u2069 \ufeff é 👩‍👩‍👧 𝒳",
    "tab\there  two  spaces",
    "x" * 3000,
    "<" * 500,
    "-5 degrees, +3, #hashtag, 1.5, 2024.",
    "> " * 150 + "deep",
    "- " * 150 + "deep",
    "| a | b |\n|---|---|\n| 1 | 2 | a third | and a fourth |",
    "\\begin{document} \\( unclosed $$ unclosed \\[ too",
    "http://192.0.2.1/%41%E4%BD%A0?q=100%25&amp;x=%zz https://192.0.2.1/路径?q=中",
]
# (a reply in Markdown, its text as it is shown)
MARKDOWN = [
    ("**bold** and *slanted* ~~gone~~ `co<b>de`", "bold and slanted gone co<b>de"),
    ("# Title\n\ntext\n\n---\n\n> quoted <i>", "Title text quoted <i>"),
    ("3. c\n4. d\n7. g\n\n- x\n  - y <b>", "c d g x y <b>"),
    ("```cpp title=a\n#include <map>\nauto x = a < b;\n```", "cpp title=a #include <map> auto x = a < b;"),
    ("```\n</code></pre><img src=x>\n```", "</code></pre><img src=x>"),
    ("    indented <code>\n", "indented <code>"),
    ("| a | b |\n|---|--:|\n| <b> | `x` |", "a b <b> x"),
    ("[the bank](https://192.0.2.1/login)", "the bank (https://192.0.2.1/login)"),
    ('[t](http://192.0.2.1 "a <b> title")', 't (http://192.0.2.1 "a <b> title")'),
    ("![a picture](http://192.0.2.1/a.png)", "a picture (http://192.0.2.1/a.png)"),
    ("![p](data:image/png;base64,xxxx)", "![p](data:image/png;base64,xxxx)"),
    (
        "[t](https://192.0.2.1/%41?a&amp;b 't &lt; u') ![p](<http://192.0.2.1/%42&copy;>)",
        't (https://192.0.2.1/%41?a&amp;b "t &lt; u") p (http://192.0.2.1/%42&copy;)',
    ),
    ("https://192.0.2.1/a_b_c?x=1&y=<2>", "https://192.0.2.1/a_b_c?x=1&y=<2>"),
    ("line one\nline two\\\nline three", "line one line two line three"),
    ("```python\nunclosed <fence>", "python unclosed <fence>"),
]
FORMULAS = ["$$\\frac{1}{2}$$", "\\(y^2\\)", "\\[\nx\n= 1\n\\]", "so $x^2 + 1$ is", "$$\na_1\n- b\n$$"]
NOT_FORMULAS = [
    "$$\\undefinedcommand{$$",
    "\\(\\href{javascript:alert(1)}{x}\\)",
    "\\(\\includegraphics{http://192.0.2.1/a}\\)",
    "$$a = 5 % of it$$",  # what would be hidden
    "\\(a \\\\% b\\)",
    "$x^2 \\phantom{said}$",
    "$$\\def\\a{said} x$$",
]
ALLOWED = {
    *("div", "span", "p", "br", "h3", "h4", "h5", "h6", "ul", "ol", "li", "strong", "em", "s", "code", "pre"),
    *("blockquote", "hr", "a", "table", "thead", "tbody", "tr", "th", "td", "button", "svg", "path"),
}
ATTRIBUTES = {
    *("class", "dir", "href", "rel", "target", "tabindex", "role", "type", "aria-label", "title", "value"),
    *("viewBox", "aria-hidden", "d"),
}


def squeezed(text: str) -> str:
    return re.sub(r"[\s\ufeff]+", "", text)


def elements(visitor: Any) -> list[tuple[str, list[str]]]:
    return visitor.page.locator("article .content").evaluate_all(
        """all => all.flatMap((each) => [...each.querySelectorAll("*:not(.formula *)")].map(
             (inner) => [inner.localName, inner.getAttributeNames()]))"""
    )


@pytest.fixture
def visitor(site: Any, visit: Any) -> Any:
    """It fails on any request of a text, and on a violated policy."""
    visitor = visit(site)
    logged: list[str] = []
    visitor.page.on("console", lambda message: logged.append(message.text))
    yield visitor
    assert not [url for url in visitor.asked if "192.0.2.1" in url or "/logout" in url]
    assert visitor.page.title() == "nano"
    assert not logged


def test_every_character_is_shown(visitor: Any) -> None:
    visitor.load([(role, text) for text in VERBATIM for role in ("user", "assistant")])
    for role in ("user", "assistant"):
        for text, shown in zip(VERBATIM, visitor.said(role), strict=True):
            assert squeezed(shown) == squeezed(text), (role, text)
    raw = visitor.page.locator("article.user .content").all_text_contents()
    assert raw == VERBATIM  # with its blanks
    names = {name for name, _ in elements(visitor)}
    assert names <= ALLOWED - {"table", "svg"}, names
    for _, attributes in elements(visitor):
        assert set(attributes) <= ATTRIBUTES, attributes
    for link in visitor.page.locator("article .content a").all():
        assert re.match(r"https?://|mailto:", link.get_attribute("href"))
    assert visitor.page.locator("article.user .content *").count() == 0


def test_markdown_in_replies(visitor: Any) -> None:
    visitor.load([(role, text) for text, _ in MARKDOWN for role in ("user", "assistant")])
    page = visitor.page
    assert visitor.said("user") == [text.strip() for text, _ in MARKDOWN]
    for (text, expected), shown in zip(MARKDOWN, visitor.said("assistant"), strict=True):
        assert squeezed(shown) == squeezed(expected), text
    assert page.locator("article.assistant strong").inner_text() == "bold"
    assert page.locator("ol > li").evaluate_all("all => all.map(each => each.value)") == [3, 4, 7]
    sync_api.expect(page.locator("pre .hl-meta").first).to_be_visible()  # highlighted
    assert {name for name, _ in elements(visitor)} <= ALLOWED
    for _, attributes in elements(visitor):
        assert set(attributes) <= ATTRIBUTES, attributes
    for link in page.locator("article .content a").all():
        assert link.get_attribute("rel") == "noopener noreferrer"
        assert re.match(r"https?://", link.get_attribute("href"))


def test_formulas(visitor: Any) -> None:
    texts = [*FORMULAS, *NOT_FORMULAS]
    visitor.load([(role, text) for text in texts for role in ("user", "assistant")])
    page = visitor.page
    sync_api.expect(page.locator("article.assistant .katex")).to_have_count(len(FORMULAS))
    assert visitor.said("assistant")[len(FORMULAS) :] == NOT_FORMULAS  # shown as they were written
    assert page.locator("article.user .katex").count() == 0
    assert page.locator("article .content :is(a, img, form, input, iframe)").count() == 0


def test_a_growing_reply_ends_like_a_whole_one(visitor: Any) -> None:
    """Blocks are redrawn only when they change."""
    script = """async (texts) => {
      const { render } = await import(new URL("page/markdown.js", location.href));
      const wrong = [];
      for (const text of texts) {
        const [grown, whole] = [document.createElement("div"), document.createElement("div")];
        for (let end = 0; end < text.length; end += 7) render(grown, text.slice(0, end));
        render(grown, text);
        render(whole, text);
        if (!grown.isEqualNode(whole)) wrong.push(text);
      }
      return wrong;
    }"""
    texts = [text for text in VERBATIM if len(text) < 1000] + [text for text, _ in MARKDOWN]
    plain = [text for text in texts if "```cpp" not in text and "```python" not in text]
    assert visitor.page.evaluate(script, [*plain, "\n\n".join(plain)]) == []


def test_right_to_left(visitor: Any) -> None:
    arabic = "مرحبا بالعالم (أهلا)."
    visitor.load([("user", arabic), ("assistant", f"{arabic}\n\nEnglish.\n\n- {arabic}\n\n```\nx = 1\n```")])
    page = visitor.page
    direction = "each => getComputedStyle(each).direction"
    # The message box, titles and every paragraph have the direction of their own text.
    assert page.locator("article.user .content").evaluate(direction) == "rtl"
    assert page.locator("article.assistant p").first.evaluate(direction) == "rtl"
    assert page.locator("article.assistant p", has_text="English").evaluate(direction) == "ltr"
    assert page.locator("article.assistant ul").evaluate(direction) == "rtl"
    assert page.locator("article.assistant pre").evaluate(direction) == "ltr"
    assert page.locator("#conversations .open").evaluate(direction) == "rtl"
    for box in ("#message", "#text"):
        page.locator(box).evaluate("(each, text) => { each.value = text; }", arabic)
        assert page.locator(box).evaluate(direction) == "rtl"


def test_a_streamed_reply_is_drawn_alike(site: Any, visitor: Any) -> None:
    """The pieces of a reply as the server would send them, with a tag cut in two."""
    text = "#include <vector>\n\n**Hi** <div style='position:fixed'>&lt;x $x^2$</div>"
    pieces = [text[at : at + 3] for at in range(0, len(text), 3)]
    events = [{"choices": [{"delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    events.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    visitor.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream")
    )
    visitor.say("Say it")
    visitor.until_answered(1)
    sync_api.expect(visitor.page.locator(".katex")).to_have_count(1)
    shown = visitor.said("assistant")[0]
    assert "#include <vector>" in shown
    assert "Hi <div style='position:fixed'>&lt;x " in shown
    assert shown.endswith("</div>")


def test_a_screen_reader_can_use_it(site: Any, visit: Any) -> None:
    """axe-core finds nothing serious in any state of the page, nor in the contrast of either theme."""
    package = pytest.importorskip("axe_playwright_python")
    axe = (Path(package.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    visitor = visit(site)
    page = visitor.page
    page.evaluate(axe)

    def check(state: str, rules: str = "") -> None:
        only = f", runOnly: ['{rules}']" if rules else ""
        found = page.evaluate(f"axe.run(document, {{resultTypes: ['violations']{only}}})")["violations"]
        serious = [
            (each["id"], [node["html"][:200] for node in each["nodes"]])
            for each in found
            if each["impact"] in ("serious", "critical")
        ]
        assert not serious, (state, serious)

    check("empty")
    page.locator("#open-settings").click()
    visitor.load([(role, text) for text, _ in MARKDOWN for role in ("user", "assistant")])
    sync_api.expect(page.locator("pre .hl-meta").first).to_be_visible()
    page.locator("#conversations li > .icon").first.click()
    check("settings, messages and a menu")
    page.locator("#theme").click()
    page.locator("#theme").click()
    assert page.locator("html").get_attribute("data-theme") == "dark"
    check("dark", "color-contrast")
    page.get_by_label("Edit").first.click()
    check("an edited message", "label")
    page.locator("#tab-generation").click()
    check("text generation")
    names = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea')].map((each) =>"
        " each.ariaLabel || each.textContent || each.labels?.[0]?.textContent || '')"
    )
    assert all(name.strip() for name in names)


def test_weight_and_first_draw(site: Any, visit: Any) -> None:
    """At most 300 kB travel before the page is usable; it draws within 0.5 s on an idle machine."""
    visitor = visit(site)
    visitor.page.wait_for_load_state("networkidle")
    entries = "performance.getEntries().filter((each) => 'transferSize' in each)"
    sizes = visitor.page.evaluate(f"{entries}.map((each) => [each.name, each.transferSize])")
    assert len(sizes) > 10
    total = sum(size for _, size in sizes)
    assert 20_000 < total <= 300_000
    assert not [name for name, _ in sizes if "katex" in name or "highlight" in name]
    begin = time.monotonic()
    visitor.page.goto(site.url)
    visitor.page.wait_for_selector("[data-ready]")
    drawn = visitor.page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    print(f"{total} bytes, first draw {drawn:.0f} ms, ready {1000 * (time.monotonic() - begin):.0f} ms")
    assert drawn < 5_000  # the machine of a test may be busy


def test_the_libraries_are_the_published_files() -> None:
    folder = STATIC / "vendor"
    listed = dict(line.split()[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    kept = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix in (".js", ".css", ".woff2")
    }
    assert listed.keys() == kept
    for name, digest in listed.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name


def test_sizes_of_the_page() -> None:
    for path in STATIC.glob("*.*"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path.name
