"""Tool calls in text, complete, streamed and cut off; and the tools of a request as text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi")

from xverse.serve import tools
from xverse.serve.calls import CallParser, Content
from xverse.serve.protocol import ChatRequest

NAMES = {"f", "find_city", "find_street"}


def call(arguments: str = "{}", name: str = "f") -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


def parsed(
    pieces: list[str], cut: bool = False, names: set[str] = NAMES
) -> tuple[str, list[list[str]], bool]:
    """The content, the calls as [name, arguments], and whether the last call was cut off."""
    parser = CallParser(names)
    found = [each for piece in pieces for each in parser.push(piece)] + parser.end(cut)
    content, calls = "", list[list[str]]()
    for each in found:
        if isinstance(each, Content):
            content += each.text
        elif each.name is not None:
            calls.append([each.name, each.arguments])
        else:
            calls[-1][1] += each.arguments
    return content, calls, parser.open


CASES: list[tuple[str, str, list[list[str]]]] = [
    ("nothing", "nothing", []),
    (" nothing \n", " nothing \n", []),
    (call(), "", [["f", "{}"]]),
    (
        "Sure!\n" + call() + call('{"a": [1, {"b": "}"}]}'),
        "Sure!",
        [["f", "{}"], ["f", '{"a": [1, {"b": "}"}]}']],
    ),
    ("a " + call() + " b", "a  b", [["f", "{}"]]),
    ("\n" + call() + "\n", "", [["f", "{}"]]),
    ("<tool_call>no JSON</tool_call>!", "<tool_call>no JSON</tool_call>!", []),
    (call(name="g"), call(name="g"), []),
    ("<tool_call>" + "[" * 9000, "<tool_call>" + "[" * 9000, []),
    (
        '<tool_call>\n{ "name" : "f" , "arguments" : {"a": "\\"{"} }\n</tool_call>',
        "",
        [["f", '{"a": "\\"{"}']],
    ),
    ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [["f", '{"a": 1}']]),
    ('<tool_call>{"name": "f"}</tool_call>', "", [["f", "{}"]]),
    ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [["f", '{"a": 1}']]),
    (call()[: -len("</tool_call>")], "", [["f", "{}"]]),
    ('<tool_call>{"name": "f", "arguments": {}, "why": 1}</tool_call>x', "x", [["f", "{}"]]),
    (call('{"a": "深圳"}'), "", [["f", '{"a": "深圳"}']]),
    (call('{"a": "\\ud800"}'), "", [["f", '{"a": "\\ud800"}']]),
]


@pytest.mark.parametrize(("text", "content", "calls"), CASES)
@pytest.mark.parametrize("size", [1, 5, 10_000])
def test_parse(text: str, content: str, calls: list[list[str]], size: int) -> None:
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert parsed(pieces) == (content, calls, False)
    assert parsed(pieces, names=set()) == (text, [], False)


@given(
    st.lists(st.sampled_from(["<tool_call>", "</tool_call>", call(), '{"name": "f", ', "}", " ", "深", "<"])),
    st.data(),
)
def test_pieces_do_not_matter(parts: list[str], data: Any) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for cut in (False, True):
        assert parsed(pieces, cut) == parsed([text], cut)


def test_a_call_is_cut_anywhere() -> None:
    """What arrives is the beginning of the call, never its raw text."""
    text = call('{"a": 1}', name="find_city")
    for end in range(1, len(text)):
        content, calls, cut = parsed(["Sure! ", text[:end]], cut=True)
        begun = end >= len('<tool_call>{"name": "find_c')
        assert [name for name, _ in calls] == ["find_city"] * begun
        assert begun or content.strip() in ("Sure!", "Sure! " + text[: min(end, 10)])
        if begun:
            assert content == "Sure!"
            assert '{"a": 1}'.startswith(calls[0][1])
            assert cut == (calls[0][1] != '{"a": 1}')


def test_what_is_certain_is_sent_at_once() -> None:
    parser = CallParser(NAMES)
    assert parser.push("Sure! <to") == [Content("Sure!")]
    assert parser.push('ol_call>{"name": "f", "arguments": ') == []
    assert [(each.name, each.arguments) for each in parser.push('{"a": "x')] == [
        ("f", ""),
        (None, '{"a": "x'),
    ]  # type: ignore[union-attr]
    assert [each.arguments for each in parser.push('yz"}')] == ['yz"}']  # type: ignore[union-attr]


def offered(**function: Any) -> str:
    body = ChatRequest.model_validate(
        {"messages": [{"role": "user", "content": "x"}], "tools": [{"function": {"name": "f", **function}}]}
    )
    return tools.chat_messages(body.messages, tools.offered_tools(body))[0]["content"]


def test_tools_are_written_as_the_client_wrote_them() -> None:
    """Text as text, and no fields that the client did not send."""
    schema = {"type": "object", "properties": {"城市": {"type": "string", "default": None}}}
    text = offered(description="查询天气", parameters=schema, strict=True, extra=1)
    assert "\\u" not in text
    line = json.loads(text.splitlines()[1])
    assert line == {"name": "f", "description": "查询天气", "parameters": schema}
    assert json.loads(offered(description=None, parameters=None).splitlines()[1]) == {"name": "f"}
