"""Which replies a schema permits."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("llguidance")

from xverse.serve.grammar import Grammars
from xverse.serve.protocol import ChatRequest
from xverse.tokenizer import Tokenizer

CITY = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


def allowed(tokenizer: Tokenizer, schema: dict[str, Any], text: str) -> bool:
    asked = ChatRequest.model_validate(
        {
            "messages": [{"role": "user", "content": "x"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        }
    )
    grammars = Grammars(tokenizer, (tokenizer.eos_id,))
    form = grammars.of_chat(asked)
    assert form is not None
    matcher = grammars.start(form)
    try:
        for token in [*tokenizer.encode(text), tokenizer.eos_id]:
            matcher.accept(token)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("schema", "value", "right"),
    [
        (CITY, {"name": "a"}, True),
        (CITY, {"name": "a", "b": 1}, False),
        ({**CITY, "additionalProperties": True}, {"name": "a", "b": 1}, True),
        ({"type": "array", "items": CITY}, [{"name": "a", "b": 1}], False),
        ({"anyOf": [CITY, {"type": "null"}]}, {"name": "a", "b": 1}, False),
        ({"$defs": {"C": CITY}, "$ref": "#/$defs/C"}, {"name": "a", "b": 1}, False),
        ({"type": "object"}, {"b": 1}, True),
        # A property of that name, or a value that looks like a schema, is neither.
        ({"type": "object", "properties": {"properties": CITY}}, {"properties": {"name": "a"}}, True),
        ({"const": {"properties": {}}}, {"properties": {}}, True),
        # One part names properties that the other does not.
        ({"allOf": [CITY, {"type": "object", "properties": {"b": {}}}]}, {"name": "a", "b": 1}, True),
    ],
    ids=str,
)
def test_only_properties_that_are_named(
    tiny_tokenizer: Tokenizer, schema: dict[str, Any], value: Any, right: bool
) -> None:
    assert allowed(tiny_tokenizer, schema, json.dumps(value)) is right
