"""Which replies a schema permits, and that they end."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import jsonschema
import pytest

pytest.importorskip("llguidance")

from benchmarks.studies.schemas import Writer
from xverse.serve import schemas
from xverse.serve.grammar import Grammars, Source
from xverse.serve.protocol import CompletionRequest, Tool
from xverse.tokenizer import Tokenizer
from xverse.tokenizer.tools import CLOSE, OPEN

CITY = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


@pytest.fixture(scope="module")
def grammars(tiny_tokenizer: Tokenizer) -> Grammars:
    return Grammars(tiny_tokenizer, (tiny_tokenizer.eos_id,))


def allowed(grammars: Grammars, tokenizer: Tokenizer, schema: dict[str, Any], text: str) -> bool:
    compiled = asyncio.run(grammars.compiled(Source(schemas.grammar(schema), "response_format")))
    grammar = grammars.start(compiled, CompletionRequest(prompt="", guided_json=schema))
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


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "number", "exclusiveMinimum": 0},
        {"type": "number", "exclusiveMaximum": 0},
        {"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 1.0001},
        {"type": "number", "minimum": 0, "exclusiveMinimum": True, "maximum": 1e300},
        {"exclusiveMinimum": -(10**30), "type": "integer"},
        {"type": "integer", "multipleOf": 7},
        {"type": "integer", "multipleOf": 3600, "minimum": 1},
        {"type": "number", "multipleOf": 0.3, "maximum": -1},
        {"type": ["null", "number"], "multipleOf": 13},
        {"type": "array", "items": {"type": "integer", "multipleOf": 11}, "minItems": 2, "maxItems": 2},
        *(
            {"type": "string", "format": name}
            for name in ("time", "date-time", "duration", "hostname", "email")
        ),
    ],
    ids=str,
)
def test_writers_of_one_character_come_to_an_end(vocabulary: Any, schema: Any) -> None:
    """Where it is allowed, and an end only where nothing else is."""
    known = {token: index for index, token in enumerate(vocabulary.tokens.bytes)}
    for character in (b"0", b"7"):
        writer, text = Writer(vocabulary, schemas.grammar(schema)), b""
        while not writer.matcher.is_stopped():
            allowed = writer.allowed()
            if known[character] not in allowed and writer.matcher.is_accepting():
                break
            text += writer.add(known[character] if known[character] in allowed else int(allowed[-1]))
            assert len(text) < 400, text
        if schema.get("exclusiveMinimum") is not True:
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"a": {"type": "null"}}},
        {"type": ["object", "null"], "properties": {"a": {"type": "null"}}},
        {"additionalProperties": {"type": "null"}, "maxProperties": 1},
        {"$ref": "#/$defs/A", "$defs": {"A": {"properties": {"a": {"type": "null"}}}}},
        {"anyOf": [{"properties": {"a": {"type": "null"}}}, {"properties": {"b": {"type": "null"}}}]},
        *({"type": name} for name in ("string", "integer", ["array", "null"], 5)),
    ],
    ids=str,
)
def test_arguments_are_an_object(vocabulary: Any, parameters: Any) -> None:
    tool = Tool.model_validate({"type": "function", "function": {"name": "f", "parameters": parameters}})
    if "object" not in str(parameters.get("type", "object")):
        with pytest.raises(ValueError, match="must be 'object'"):
            schemas.call_grammar([tool])
        return
    for seed in range(3):
        text = Writer(vocabulary, schemas.call_grammar([tool])).draw(seed).decode()
        call = json.loads(text.removeprefix(OPEN).removesuffix(CLOSE))
        assert isinstance(call["arguments"], dict)
