"""From a client's JSON schemas to the grammar of a reply, as text for llguidance.

A schema is rewritten so that llguidance accepts it and a model comes to an end. Whatever the rewritten schema
permits, the client's permits too, and where the client's permits something, so does the rewritten one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

from xverse.serve.protocol import Tool
from xverse.serve.schema_parts import (
    ALL,
    ITEMS,
    KEPT,
    MEMBERS,
    REFUSED,
    Document,
    Part,
    Unsupported,
    combined,
    keys,
)
from xverse.serve.structures import Structure
from xverse.tokenizer.tools import CLOSE, OPEN

MOST_BYTES = 64 * 1024  # of a request's schemas
# Only the spaces after commas and colons: otherwise a model may write whitespace without end.
_TIGHT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# The formats that llguidance enforces, with bounds that lose nothing: otherwise a model may write digits or
# labels without end. Other formats are annotations, as JSON Schema has it.
_FORMATS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("date", "ipv4", "ipv6", "uuid")},
    **{name: {"maxLength": 254} for name in ("email", "hostname")},
    **{name: {"pattern": "^([0-9]{0,9}[^0-9])*[0-9]{0,9}$"} for name in ("time", "date-time", "duration")},
    "uri": {"maxLength": 2000},
}
_MOST = 10**18 - 1024  # llguidance's ranges of numbers end at 18 digits, and it reads this as a double
_LEAST = 1e-30  # other than 0
_STEP = 1e-12  # between an exclusive bound and the nearest number that is permitted
_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


class TooLarge(ValueError):
    """A schema above the size limit."""


def of_structure(structure: Structure) -> str:
    """The grammar of what a request asks for. Raises as ``grammar``."""
    value = structure.value
    if structure.kind == "json_object":
        return grammar({"type": "object"})
    if structure.kind == "json_schema":
        return grammar(value)
    if len(json.dumps(value)) > MOST_BYTES:
        raise TooLarge(f"it is too large; the limit is {MOST_BYTES} bytes")
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
    """The grammar of the values that ``schema`` permits. Raises ValueError with the reason for a schema that
    is not supported, and RecursionError for one that is nested too deeply."""
    return llguidance.LLMatcher.grammar_from_json_schema(_prepared(schema, 0)[0])


def call_grammar(tools: Sequence[Tool]) -> str:
    """The grammar of a call of one of ``tools``. Each schema is a document of its own, so that its references
    keep their meaning. Raises as ``grammar``."""
    rules, size = [], 0
    for number, tool in enumerate(tools):
        try:
            schema, size = _prepared(_arguments(tool.function.parameters), size)
        except ValueError as error:
            raise type(error)(f"tool '{tool.function.name}': {error}") from None
        head = json.dumps(f'{{"name": {json.dumps(tool.function.name)}, "arguments": ')
        rules.append(f'call{number}: {head} %json {json.dumps(schema)} "}}"\n')
    calls = " | ".join(f"call{number}" for number in range(len(tools)))
    lark = f"start: {json.dumps(OPEN)} ({calls}) {json.dumps(CLOSE)}\n"
    return llguidance.LLMatcher.grammar_from_lark(lark + "".join(rules))


def _arguments(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """Parameters that say nothing but "an object" are none: OpenAI's way to declare a tool without any."""
    parameters = parameters or {}
    given = parameters.get("type", "object")
    if not keys(parameters) - {"type"} and given == "object":
        return _NOTHING
    if "object" not in (given if isinstance(given, list) else [given]):
        raise Unsupported("the arguments of a call are an object; 'type' must be 'object'")
    return {**parameters, "type": "object"}


def _prepared(schema: dict[str, Any], before: int) -> tuple[dict[str, Any], int]:
    """The rewritten schema, and the bytes of it and those ``before``."""
    size = before + len(json.dumps(schema, ensure_ascii=False).encode(errors="replace"))
    if size > MOST_BYTES:
        raise TooLarge(f"the schema has {size} bytes; the limit is {MOST_BYTES}")
    rewriter = _Rewriter(schema)
    root = rewriter.value(schema)
    if isinstance(root, bool):
        root = {} if root else {"enum": []}
    return {**root, "$defs": rewriter.definitions, "x-guidance": _TIGHT}, size


class _Rewriter:
    """Builds the rewritten schema of one document. Referenced parts go into ``definitions``.

    Objects that list their properties get no others by default: JSON Schema allows them, but authors of a
    list rarely expect them, and a model may write them without end. Where several parts of a schema describe
    the same object (``allOf``, ``anyOf`` or ``$ref`` beside ``properties``), each must leave room for the
    properties that the others list: these are its ``outside`` names. None keeps the object open.
    """

    def __init__(self, root: Any) -> None:
        self.definitions: dict[str, Any] = {}
        self._document = Document(root)
        self._references: dict[tuple[Any, ...], str] = {}
        self._shared: frozenset[str] = frozenset()  # members of the current value that several parts describe
        self._open = False  # whether all objects stay open here

    def value(self, part: Any) -> Part:
        """The schema of a value that no other part describes."""
        self._document.check(part)
        if self._open:
            return self._part(part, None)
        before, self._shared = self._shared, self._document.shared(part)
        try:
            return self._alone(part)
        finally:
            self._shared = before

    def _inner(self, part: Any, *names: str) -> Part:
        """The schema of a member of the value. One that several parts describe stays open, with all in it."""
        before, self._open = self._open, self._open or not self._shared.isdisjoint(names)
        try:
            return self.value(part)
        finally:
            self._open = before

    def _alone(self, part: Any) -> Part:
        if isinstance(part, dict) and len(combined(part)) == 1 and not MEMBERS & part.keys():
            return self._part(part, None, alone=True)
        return self._part(part, frozenset() if self._document.closable(part) else None)

    def _part(self, part: Any, outside: frozenset[str] | None, alone: bool = False) -> Part:
        if isinstance(part, bool):
            return part
        self._document.check(part)
        for key in REFUSED & part.keys():
            raise Unsupported(f"'{key}' is not supported")
        result = {key: part[key] for key in part if key in KEPT}
        _narrow(part, result)
        self._arrays(part, result)
        self._objects(part, result)
        if outside is not None and "properties" in part and "additionalProperties" not in result:
            others = (outside | self._document.names(part)) - part["properties"].keys()
            result["properties"] |= dict.fromkeys(sorted(others), True)
            result["additionalProperties"] = False
        return self._in_place(part, result, outside, alone)

    def _arrays(self, part: dict[str, Any], result: dict[str, Any]) -> None:
        if part.get("uniqueItems") and part.get("maxItems", 2) > 1:
            raise Unsupported(
                "'uniqueItems' cannot be enforced while a reply is written; leave it out and remove repeated "
                "items afterwards (pydantic: a list instead of a set)"
            )
        for key in ("prefixItems", "items", "additionalItems"):
            given = part.get(key)
            if isinstance(given, list):
                result[key] = [self._inner(item, ITEMS) for item in given]
            elif given is not None:
                result[key] = self._inner(given, ITEMS)

    def _objects(self, part: dict[str, Any], result: dict[str, Any]) -> None:
        for key in ("properties", "patternProperties"):
            if key in part:
                result[key] = {name: self._inner(item, name, ALL) for name, item in part[key].items()}
        if "additionalProperties" in part:
            result["additionalProperties"] = self._inner(part["additionalProperties"], ALL)
        if part.get("unevaluatedProperties", True) is not True:
            if combined(part) or "additionalProperties" in part:
                raise Unsupported("'unevaluatedProperties' is not supported in schemas that combine parts")
            result["additionalProperties"] = self._inner(part["unevaluatedProperties"], ALL)
        if part.get("propertyNames", True) is not True:
            self._property_names(part, result)
        if part.get("minProperties", 0) > 1 and "patternProperties" in result:
            raise Unsupported("'minProperties' is not supported together with patterns of names")

    def _property_names(self, part: dict[str, Any], result: dict[str, Any]) -> None:
        """Names from a list become properties, names of a pattern a pattern of properties."""
        names = self._document.resolved(part["propertyNames"])
        given = keys(names) - {"type"}
        others = result.pop("additionalProperties", True)
        if {"properties", "patternProperties"} & result.keys():
            given = {"properties"}
        if given in ({"enum"}, {"const"}):
            allowed = names.get("enum", [names.get("const")])
            result["properties"] = {name: others for name in allowed if isinstance(name, str)}
        elif given == {"pattern"}:
            result["patternProperties"] = {names["pattern"]: others}
        elif given:
            text = "'propertyNames' is supported only with an enum or a pattern, and without 'properties'"
            raise Unsupported(text)
        result["additionalProperties"] = False if given else others

    def _in_place(
        self, part: dict[str, Any], result: dict[str, Any], outside: frozenset[str] | None, alone: bool
    ) -> Part:
        """Add the parts that describe the same value as ``part``."""
        groups = combined(part)
        names = [frozenset().union(*map(self._document.names, items)) for _, items in groups]
        rewritten: list[Part] = []
        for at, (key, items) in enumerate(groups):
            if key == "oneOf":
                items = self._document.exclusive(items)
            room = None
            if outside is not None:
                others = [names[other] for other in range(len(groups)) if other != at]
                room = outside.union(part.get("properties", {}), *others)
            options = [self._one(item, room, alone) for item in items]
            rewritten.append(options[0] if len(options) == 1 else {"anyOf": options})
        if len(rewritten) == 1 and not result:
            return rewritten[0]
        if rewritten:
            result["allOf"] = rewritten
        return result

    def _one(self, part: Any, outside: frozenset[str] | None, alone: bool) -> Part:
        reference = part.get("$ref") if isinstance(part, dict) and part.keys() == {"$ref"} else None
        if not isinstance(reference, str):
            return self.value(part) if alone else self._part(part, outside)
        self._document.resolved(part)  # not a circle of references
        key = (reference, self._open, "alone") if alone else (reference, self._open, self._shared, outside)
        if key not in self._references:
            name = self._references[key] = f"r{len(self._references)}"
            target = self._document.target(reference)
            self.definitions[name] = self.value(target) if alone else self._part(target, outside)
        return {"$ref": f"#/$defs/{self._references[key]}"}


def _narrow(part: dict[str, Any], result: dict[str, Any]) -> None:
    """What llguidance would refuse although it can be left out, narrowed or written in another way."""
    for key, value in result.items():
        if key.startswith(("min", "max")) and isinstance(value, float) and value.is_integer():
            result[key] = int(value)
    if isinstance(name := part.get("format"), str) and name in _FORMATS:
        result |= {"format": name} | (_FORMATS[name] if "minLength" not in part else {}) | result
    sides = (("minimum", "exclusiveMinimum", -1), ("maximum", "exclusiveMaximum", 1))
    for key, exclusive, sign in sides:
        if isinstance(part.get(exclusive), bool):  # of draft 4
            del result[exclusive]
            if part[exclusive] and key in part:
                result[exclusive] = result.pop(key)
        for bound in {key, exclusive} & result.keys():
            value = result[bound] * sign
            if value < -_MOST or 0 < abs(value) < _LEAST:
                raise Unsupported(f"'{bound}': only 0 and numbers of 1e-30 to 1e18 are supported")
            result[bound] = min(value, _MOST) * sign
        if "multipleOf" in part and not {key, exclusive} & result.keys():
            result[key] = _MOST * sign  # otherwise a model may write digits that never become a multiple
    low, high = (result.get(exclusive, result.get(key, math.inf * sign)) for key, exclusive, sign in sides)
    if part.get("type") != "integer" and high - low < 1:
        for key, exclusive, sign in sides:  # llguidance itself permits 0 for "above 0 and below 0.5"
            if exclusive in result:
                result[key] = (
                    min(result.pop(exclusive) * sign - _STEP, result.get(key, _MOST * sign) * sign) * sign
                )
