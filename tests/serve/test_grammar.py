"""Which replies a schema permits."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

pytest.importorskip("llguidance")

from xverse.serve import schemas
from xverse.serve.grammar import Grammars, Source
from xverse.tokenizer import Tokenizer

CITY = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


@pytest.fixture(scope="module")
def grammars(tiny_tokenizer: Tokenizer) -> Grammars:
    return Grammars(tiny_tokenizer, (tiny_tokenizer.eos_id,))


def allowed(grammars: Grammars, tokenizer: Tokenizer, schema: dict[str, Any], text: str) -> bool:
    compiled = asyncio.run(grammars.compiled(Source(schemas.grammar(schema), "response_format")))
    grammar = grammars.start(compiled)
    for token in [*tokenizer.encode(text), tokenizer.eos_id]:
        if not grammar.allowed()[token]:
            return False
        grammar.accept(token)
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
    grammars: Grammars, tiny_tokenizer: Tokenizer, schema: dict[str, Any], value: Any, right: bool
) -> None:
    assert allowed(grammars, tiny_tokenizer, schema, json.dumps(value)) is right
