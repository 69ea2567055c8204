"""Facts about the parts of a JSON schema: references, the properties of combined parts, exclusive parts."""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Sequence
from typing import Any

Part = dict[str, Any] | bool

_COUNTS = ("minProperties", "maxProperties", "minItems", "maxItems", "minLength", "maxLength")
_NUMBERS = ("minimum", "maximum", "multipleOf")
_EXCLUSIVE = ("exclusiveMinimum", "exclusiveMaximum")
_ALTERNATIVES = ("allOf", "anyOf", "oneOf")
_ITEMS = ("items", "prefixItems", "additionalItems")
_OBJECTS = ("properties", "patternProperties", "additionalProperties", "unevaluatedProperties")
# Keywords that are enforced as they are.
KEPT = frozenset(("type", "enum", "const", "required", "pattern", *_COUNTS, *_NUMBERS, *_EXCLUSIVE))
# Keywords that would have an effect which cannot be enforced.
REFUSED = frozenset(
    (
        *("contains", "not", "if", "dependentSchemas", "dependentRequired", "dependencies"),
        *("unevaluatedItems", "$dynamicRef", "$recursiveRef"),
    )
)
# Keywords that say which members an object or a list has.
MEMBERS = frozenset(
    (*_ITEMS, *_OBJECTS, "propertyNames", "required", "minProperties", "maxProperties", "enum", "const")
)
_HANDLED = frozenset(("$ref", *_ALTERNATIVES, *_OBJECTS, "propertyNames", *_ITEMS, "uniqueItems", "format"))
_BASIC = ("string", "number", "boolean", "null", "array", "object")
_RANGES = (
    ("number", "minimum", "maximum"),
    ("string", "minLength", "maxLength"),
    ("array", "minItems", "maxItems"),
    ("object", "minProperties", "maxProperties"),
)
_SHAPES = {
    **dict.fromkeys(("properties", "patternProperties"), "an object"),
    **dict.fromkeys((*_ALTERNATIVES, "enum"), "a list with members"),
    **dict.fromkeys(("$ref", "pattern"), "text"),
    **dict.fromkeys((*_COUNTS, *_NUMBERS), "a number"),
    **dict.fromkeys(_EXCLUSIVE, "a number or, in draft 4, a truth value"),
    "required": "a list of names",
    "type": "the name of a type",
}
_MOST_WORK = 50_000  # looks at a part
ALL, ITEMS = "\0all", "\0items"
_DEPTH = 8  # of the search for a difference between two parts


class Unsupported(ValueError):
    """A schema that cannot be enforced, with the reason for its author."""


def keys(part: dict[str, Any]) -> set[str]:
    """The keywords of ``part`` that have an effect; the others are annotations."""
    return part.keys() & (KEPT | REFUSED | _HANDLED)


def combined(part: dict[str, Any]) -> list[tuple[str, Sequence[Any]]]:
    """The parts that describe the same value as ``part``, each a keyword and its alternatives."""
    groups: list[tuple[str, Sequence[Any]]] = []
    for key in _ALTERNATIVES:
        if key in part:
            items = part[key]
            groups += [(key, [item]) for item in items] if key == "allOf" else [(key, items)]
    if "$ref" in part:
        groups.append(("$ref", [{"$ref": part["$ref"]}]))
    return groups


class Document:
    """One schema with everything that its references reach."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._anchors: dict[str, Any] | None = None
        self._checked: set[int] = set()
        self._work = 0

    def check(self, part: Any) -> None:
        """Raises Unsupported if ``part`` is not a schema, and for a document that takes too long to read."""
        self._work += 1
        if self._work > _MOST_WORK:
            raise Unsupported("it combines and refers to its parts too often")
        if id(part) in self._checked or isinstance(part, bool):
            return
        if not isinstance(part, dict):
            raise Unsupported(f"{json.dumps(part)[:40]} is not a schema")
        for key, kind in _SHAPES.items():
            if key in part and not _has_shape(part[key], kind):
                raise Unsupported(f"'{key}' is not {kind}")
        self._checked.add(id(part))

    def target(self, reference: str) -> Any:
        """The part that a ``$ref`` names. Raises Unsupported if it is not in the document."""
        base = self._root.get("$id") if isinstance(self._root, dict) else None
        address, _, fragment = reference.partition("#")
        if address and address.rstrip("#") != str(base).rstrip("#"):
            raise Unsupported(f"'$ref': {reference[:100]} is not part of the schema")
        fragment = urllib.parse.unquote(fragment)
        if fragment and not fragment.startswith("/"):
            return self._anchor(fragment)
        part = self._root
        for step in fragment.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(part, dict) and step in part:
                part = part[step]
            elif isinstance(part, list) and step.isdecimal() and int(step) < len(part):
                part = part[int(step)]
            else:
                raise Unsupported(f"'$ref': {reference[:100]} does not exist in the schema")
        return part

    def _anchor(self, name: str) -> Any:
        if self._anchors is None:
            self._anchors, rest = {}, [self._root]
            while rest:
                part = rest.pop()
                if isinstance(part, dict) and isinstance(part.get("$anchor"), str):
                    self._anchors[part["$anchor"]] = part
                rest += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        if name not in self._anchors:
            raise Unsupported(f"'$ref': #{name[:100]} does not exist in the schema")
        return self._anchors[name]

    def resolved(self, part: Any) -> dict[str, Any]:
        """``part`` as an object, without a reference around it."""
        for _ in range(100):
            self.check(part)
            if isinstance(part, bool):
                return {} if part else {"enum": []}
            if keys(part) != {"$ref"}:
                return part
            part = self.target(part["$ref"])
        raise Unsupported("'$ref': a reference leads to itself")

    def names(self, part: Any) -> frozenset[str]:
        """The properties that ``part`` and the parts combined with it list."""
        return frozenset().union(*(each.get("properties", {}) for each in self._same_value(part)))

    def shared(self, part: Any) -> frozenset[str]:
        """The properties that several of the parts combined with ``part`` describe, so that none of them may
        be closed; ``ALL`` and ``ITEMS`` stand for all properties and for the members of lists."""
        parts = self._same_value(part)
        patterns = {"patternProperties", "propertyNames", "unevaluatedProperties"}
        names = [name for each in parts for name in each.get("properties", {})]
        found = {name for name in names if names.count(name) > 1} if len(names) < 1000 else {ALL}
        if any(patterns & each.keys() for each in parts) and (names or len(parts) > 1):
            found.add(ALL)
        if len(parts) > 1 and any(each.get("additionalProperties", False) is not False for each in parts):
            found.add(ALL)
        if sum(bool({"items", "prefixItems"} & each.keys()) for each in parts) > 1:
            found.add(ITEMS)
        return frozenset(found)

    def closable(self, part: Any) -> bool:
        """Whether leaving out all properties that are not listed keeps every value that satisfies ``part``
        valid: nothing needs, counts or describes them."""
        parts = self._same_value(part)
        names: set[str] = set().union(*(each.get("properties", {}) for each in parts))
        for each in parts:
            if each.keys() & {"patternProperties", "propertyNames", "unevaluatedProperties", "enum", "const"}:
                return False
            if each.get("additionalProperties", False) is not False:
                return False
            possible = [name for name, item in each.get("properties", {}).items() if item is not False]
            if each.get("minProperties", 0) > (len(possible) if len(parts) == 1 else 0):
                return False
            if not names.issuperset(each.get("required", ())):
                return False
        return True

    def _same_value(self, part: Any) -> list[dict[str, Any]]:
        """``part`` and all parts that describe the same value, each once."""
        found: dict[int, dict[str, Any]] = {}
        rest = [part]
        while rest:
            each = rest.pop()
            self.check(each)
            if isinstance(each, dict) and id(each) not in found:
                found[id(each)] = each
                for key in _ALTERNATIVES:
                    rest += each.get(key, ())
                if "$ref" in each:
                    rest.append(self.target(each["$ref"]))
        return list(found.values())

    def exclusive(self, alternatives: Sequence[Any]) -> list[Any]:
        """The alternatives of a ``oneOf``, such that a value satisfies at most one: ``anyOf`` means the same.

        Alternatives that differ in a property are distinguished by it: it becomes required in each. Raises
        Unsupported if two may be satisfied at once.
        """
        if self._all_exclusive(alternatives):
            return list(alternatives)
        objects = [self.resolved(item) for item in alternatives]
        shared = set.intersection(*(set(item.get("properties", {})) for item in objects))
        for name in sorted(shared):
            required = [{**item, "required": [*{*item.get("required", ()), name}]} for item in objects]
            if all(self._types(item) == {"object"} for item in required) and self._all_exclusive(required):
                return required
        raise Unsupported(
            "'oneOf': a value may satisfy several of its alternatives at once; use 'anyOf', or give each a "
            "required property with a 'const' of its own"
        )

    def _all_exclusive(self, parts: Sequence[Any]) -> bool:
        if len(parts) > 64:
            raise Unsupported("'oneOf' has more than 64 alternatives; use 'anyOf'")
        pairs = ((one, other) for at, one in enumerate(parts) for other in parts[:at])
        return all(self.disjoint(one, other) for one, other in pairs)

    def disjoint(self, one: Any, other: Any, depth: int = _DEPTH) -> bool:
        """Whether it is certain that no value satisfies both."""
        if not depth:
            return False
        one, other = self.resolved(one), self.resolved(other)
        if not self._types(one) & self._types(other):
            return True
        for part, rest in ((one, other), (other, one)):
            for _, items in combined(part):
                if all(self.disjoint(item, rest, depth - 1) for item in items):
                    return True
            values = _values(part)
            if values is not None and all(self._excludes(rest, value) for value in values):
                return True
            for kind, low, high in _RANGES:
                apart = low in part and high in rest and part[low] > rest[high]
                if apart and self._types(part) & self._types(rest) == {kind}:
                    return True
        return self._types(one) & self._types(other) == {"object"} and self._different(one, other, depth)

    def _different(self, one: dict[str, Any], other: dict[str, Any], depth: int) -> bool:
        """Whether a property that one of two objects must have distinguishes them."""
        for part, rest in ((one, other), (other, one)):
            for name in part.get("required", ()):
                described = rest.get("properties", {})
                if name in described:
                    if self.disjoint(part.get("properties", {}).get(name, True), described[name], depth - 1):
                        return True
                elif rest.get("additionalProperties") is False and "patternProperties" not in rest:
                    return True
        return False

    def _types(self, part: dict[str, Any]) -> set[str]:
        """The types that values of ``part`` may have."""
        values = _values(part)
        if values is not None:
            return {_type(value) for value in values}
        given = part.get("type", _BASIC)
        types = {given} if isinstance(given, str) else set(given)
        return {"number" if name == "integer" else name for name in types}

    def _excludes(self, part: dict[str, Any], value: Any) -> bool:
        """Whether it is certain that ``value`` does not satisfy ``part``."""
        values = _values(part)
        if values is not None:
            return all(_canonical(each) != _canonical(value) for each in values)
        if _type(value) not in self._types(part):
            return True
        if part.get("type") == "integer" and _is_number(value) and value != int(value):
            return True
        if isinstance(value, str) and isinstance(part.get("pattern"), str):
            try:
                return (
                    len(value) < 1000 and _simple(part["pattern"]) and not re.search(part["pattern"], value)
                )
            except re.error:
                return False
        return False


def _simple(pattern: str) -> bool:
    """Whether Python reads a pattern as JSON Schema does, in little time."""
    return re.fullmatch(r"\^?[\w \-.:/]*\$?", pattern) is not None


def _values(part: dict[str, Any]) -> list[Any] | None:
    if "const" in part:
        return [part["const"]]
    return part["enum"] if isinstance(part.get("enum"), list) else None


def _canonical(value: Any) -> str:
    """Equal for values that JSON Schema holds equal: 1 and 1.0, but not true."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, dict):
        return json.dumps({key: _canonical(item) for key, item in value.items()}, sort_keys=True)
    if isinstance(value, list):
        return json.dumps([_canonical(item) for item in value])
    return json.dumps(value)


def _type(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    kinds = {str: "string", int: "number", float: "number", list: "array", dict: "object"}
    return kinds[type(value)]


def _has_shape(value: Any, kind: str) -> bool:
    match kind:
        case "an object":
            return isinstance(value, dict)
        case "a list with members":
            return isinstance(value, list) and bool(value)
        case "text":
            return isinstance(value, str)
        case "a number":
            return _is_number(value)
        case "a number or, in draft 4, a truth value":
            return isinstance(value, int | float)
        case "a list of names":
            return isinstance(value, list) and all(isinstance(name, str) for name in value)
        case _:
            names = value if isinstance(value, list) else [value]
            return all(name in _BASIC or name == "integer" for name in names)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
