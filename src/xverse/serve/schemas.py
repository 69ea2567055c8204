"""From a client's JSON schemas to the grammar of a reply, as text for llguidance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

from xverse.serve.protocol import Structure, Tool
from xverse.tokenizer.tools import CLOSE, OPEN

MOST_BYTES = 64 * 1024  # of a request's schemas
# Only the spaces after commas and colons: otherwise a model may write whitespace without end.
_TIGHT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# Keywords with which one part of a schema refers to the properties of another.
_COMBINED = {"allOf", "oneOf", "not", "if", "dependentSchemas", "unevaluatedProperties"}


class TooLarge(ValueError):
    """A schema above the size limit."""


def of_structure(structure: Structure) -> str:
    """The grammar of what a request asks for. Raises as ``grammar``."""
    value = structure.value
    if structure.kind == "json_object":
        return grammar({"type": "object"})
    if structure.kind == "json_schema":
        return grammar(value)
    _check_size(json.dumps(value, ensure_ascii=False))
    if structure.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(value)
    if structure.kind == "choice":
        return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, value)))
    if "::=" in value:  # GBNF, which xgrammar and llama.cpp read
        try:
            value = gbnf_to_lark(value)
        except GbnfToLarkError as error:
            raise ValueError(str(error)) from None
    return llguidance.LLMatcher.grammar_from_lark(value)


def grammar(schema: dict[str, Any]) -> str:
    """The grammar of the values that ``schema`` permits. Raises ValueError, and RecursionError for a schema
    that is nested too deeply."""
    return llguidance.LLMatcher.grammar_from_json_schema(_prepared(schema))


def call_grammar(tools: Sequence[Tool]) -> str:
    """The grammar of a call of one of ``tools``. Each schema is a document of its own, so that its references
    keep their meaning. Raises as ``grammar``."""
    rules = []
    for number, tool in enumerate(tools):
        head = json.dumps(f'{{"name": {json.dumps(tool.function.name)}, "arguments": ')
        schema = json.dumps(_prepared(tool.function.parameters or {"type": "object"}))
        rules.append(f'call{number}: {head} %json {schema} "}}"\n')
    calls = " | ".join(f"call{number}" for number in range(len(tools)))
    lark = f"start: {json.dumps(OPEN)} ({calls}) {json.dumps(CLOSE)}\n"
    return llguidance.LLMatcher.grammar_from_lark(lark + "".join(rules))


def _prepared(schema: dict[str, Any]) -> dict[str, Any]:
    _check_size(json.dumps(schema, ensure_ascii=False))
    return {**_closed(schema), "x-guidance": _TIGHT}


def _check_size(text: str) -> None:
    size = len(text.encode(errors="replace"))
    if size > MOST_BYTES:
        raise TooLarge(f"the schema has {size} bytes; the limit is {MOST_BYTES}")


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with ``additionalProperties: false`` as the default of objects that list properties.

    JSON Schema allows further properties by default, but authors of a list rarely expect them, and a model
    may generate them without end. A schema that combines parts is not changed, because one part may name the
    properties of another.
    """
    return schema if _combines(schema) else _without_others(schema)


def _combines(part: Any) -> bool:
    if isinstance(part, dict):
        return bool(_COMBINED & part.keys()) or any(map(_combines, part.values()))
    return isinstance(part, list) and any(map(_combines, part))


def _without_others(part: Any) -> Any:
    if isinstance(part, list):
        return [_without_others(item) for item in part]
    if not isinstance(part, dict):
        return part
    part = dict(part)
    for key in ("items", "prefixItems", "anyOf", "additionalProperties"):
        if key in part:
            part[key] = _without_others(part[key])
    for key in ("properties", "patternProperties", "$defs", "definitions"):
        if isinstance(part.get(key), dict):
            part[key] = {name: _without_others(item) for name, item in part[key].items()}
    if "properties" in part and not {"$ref", "anyOf"} & part.keys():
        part.setdefault("additionalProperties", False)
    return part
