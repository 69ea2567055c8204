"""Tool calls in text, complete and streamed."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")

from xverse.serve import tools
from xverse.serve.protocol import ChatRequest

ASKED = ChatRequest.model_validate(
    {
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
)


def call(arguments: str = "{}") -> str:
    return f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "count"),
    [
        ("nothing", "nothing", 0),
        (call(), None, 1),
        ("Sure! " + call() + call(), "Sure!", 2),
        ("<tool_call>no JSON</tool_call>", "<tool_call>no JSON</tool_call>", 0),
        (call().replace('"f"', '"g"'), call().replace('"f"', '"g"'), 0),
        ("<tool_call>" + "[" * 100_000, "<tool_call>" + "[" * 100_000, 0),
    ],
)
def test_parse(text: str, content: str | None, count: int) -> None:
    found, calls = tools.parse(text, ASKED)
    assert found == content
    assert [each["function"]["name"] for each in calls] == ["f"] * count


def test_arguments_can_be_sent() -> None:
    _, ((first), (second)) = tools.parse(call('{"a": "深圳"}') + call('{"a": "\\ud800"}'), ASKED)
    assert first["function"]["arguments"] == '{"a": "深圳"}'
    assert second["function"]["arguments"].encode()


def test_what_may_be_a_call_is_held_back() -> None:
    text = "Sure! a < b <tool" + call()
    for end in range(len(text)):
        sent = tools.certain(text[:end])
        assert text[:sent] == "Sure! a < b <tool"[:sent]
        assert sent >= min(end, len("Sure! a < b <tool")) - len(tools.OPEN) + 1
