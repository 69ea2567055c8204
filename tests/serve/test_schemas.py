"""Whatever a schema's grammar lets a model write satisfies the schema, and comes to an end.

Replies are drawn at random from the tokens that are allowed: a model that understands nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import enum
import ipaddress
import json
import pathlib
import time
import uuid
from typing import Annotated, Any, Literal

import jsonschema
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.studies.schemas import Writer
from tests.scale import examples
from xverse.serve import schemas
from xverse.serve.grammar_worker import Vocabulary
from xverse.serve.protocol import Tool
from xverse.tokenizer.tools import CLOSE, OPEN


def ids(vocabulary: Vocabulary) -> dict[bytes, int]:
    """Of tokens with equal bytes the last one, which llguidance prefers."""
    return {token: index for index, token in enumerate(vocabulary.tokens.bytes)}


def compiled(vocabulary: Vocabulary, schema: Any) -> Writer:
    writer = Writer(vocabulary, schemas.grammar(schema))
    assert not writer.matcher.is_error(), writer.matcher.get_error()
    return writer


def checked(schema: Any, text: bytes) -> Any:
    value = json.loads(text)
    jsonschema.Draft202012Validator(schema).validate(value)
    return value


# --- generated schemas --------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "name", "名字", "x y", "$ref", "type", 'q"'])
SCALARS = st.one_of(
    st.just({}),
    st.just({"type": "string"}),
    st.fixed_dictionaries(
        {"type": st.just("string")}, optional={"minLength": st.integers(0, 5), "maxLength": st.integers(5, 9)}
    ),
    st.sampled_from(
        [
            {"type": "string", "pattern": "^[a-c]{2,4}$"},
            {"type": "string", "format": "date"},
            {"type": "string", "format": "password"},
        ]
    ),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["integer", "number"])},
        optional={"minimum": st.integers(-50, 0), "maximum": st.integers(0, 10**20)},
    ),
    st.fixed_dictionaries({"type": st.just("integer"), "multipleOf": st.integers(1, 12)}),
    st.fixed_dictionaries(
        {
            "enum": st.lists(
                st.one_of(st.none(), st.booleans(), st.integers(-9, 9), NAMES), min_size=1, max_size=4
            )
        }
    ),
    st.fixed_dictionaries({"const": st.one_of(NAMES, st.integers(-5, 5), st.just({"a": [1, {"b": None}]}))}),
    st.sampled_from(
        [{"type": ["string", "null"]}, {"type": "boolean"}, {"type": "null"}, {"title": "any", "default": 3}]
    ),
)


def _objects(children: Any) -> Any:
    properties = st.dictionaries(NAMES, children, max_size=3)

    def required(parts: dict[str, Any]) -> Any:
        names = st.lists(st.sampled_from([*parts, "more"]), unique=True, max_size=2)
        return st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.just(parts)},
            optional={
                "required": names,
                "additionalProperties": st.one_of(st.booleans(), st.just({"type": "integer"})),
            },
        )

    return properties.flatmap(required)


def _nested(children: Any) -> Any:
    several = st.lists(children, min_size=1, max_size=3)
    return st.one_of(
        _objects(children),
        st.fixed_dictionaries(
            {"type": st.just("array")},
            optional={
                "items": children,
                "minItems": st.integers(0, 3),
                "maxItems": st.integers(3, 5),
                "prefixItems": several,
            },
        ),
        st.fixed_dictionaries({"anyOf": several}),
        st.fixed_dictionaries({"oneOf": several}),
        st.fixed_dictionaries({"allOf": several}),
        st.tuples(
            _objects(children),
            st.sampled_from(["anyOf", "allOf", "oneOf"]),
            st.lists(_objects(children), min_size=1, max_size=2),
        ).map(lambda parts: {**parts[0], parts[1]: parts[2]}),
        children.map(lambda part: {"$ref": "#/$defs/part", "$defs": {"part": part}}),
        st.tuples(children, _objects(children)).map(
            lambda parts: {**parts[1], "$ref": "#/$defs/part", "$defs": {"part": parts[0]}}
        ),
    )


def _located(schema: Any) -> Any:
    """The schema with all ``$defs`` at its root, under names of their own."""
    found: dict[str, Any] = {}

    def move(part: Any) -> Any:
        if isinstance(part, list):
            return [move(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$defs" in part and "part" in part["$defs"]:
            name = f"d{len(found)}"
            found[name] = None
            found[name] = move(part["$defs"]["part"])
            rest = {key: move(item) for key, item in part.items() if key not in ("$defs", "$ref")}
            return {**rest, "$ref": f"#/$defs/{name}"}
        return {key: item if key in ("const", "enum") else move(item) for key, item in part.items()}

    root = move(schema)
    return {**root, "$defs": found} if found else root


SCHEMAS = st.recursive(SCALARS, _nested, max_leaves=6).map(_located)
_counts = {"compiled": 0, "refused": 0}


@given(schema=SCHEMAS, seed=st.integers(0, 10**6))
@settings(
    max_examples=examples(150),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_what_compiles_yields_what_validates(vocabulary: Vocabulary, schema: Any, seed: int) -> None:
    try:
        grammar = schemas.grammar(schema)
    except ValueError:
        _counts["refused"] += 1
        return
    writer = Writer(vocabulary, grammar)
    if writer.matcher.is_error():
        _counts["refused"] += 1
        return
    _counts["compiled"] += 1
    checked(schema, writer.draw(seed))


def test_most_of_them_compiled() -> None:
    assert _counts["compiled"] > 2 * _counts["refused"]


# --- what a rewriting must keep -----------------------------------------------------------------------

A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
B, C = ({"properties": {name: {"type": "boolean"}}, "required": [name]} for name in "bc")
BASE = {"$defs": {"B": {"type": "object", "properties": {"y": {"type": "string"}}}}}
CAT = {"type": "object", "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}}}
DOG = {"type": "object", "properties": {"kind": {"const": "dog"}, "name": {"type": "string"}}}
PET = {"discriminator": {"propertyName": "kind"}, "oneOf": [CAT, DOG]}


@pytest.mark.parametrize(
    ("schema", "value", "right"),
    [
        # Parts beside each other: each names properties of the same object.
        ({**A, "anyOf": [B, C]}, {"a": 1, "b": True}, True),
        ({**A, "anyOf": [B, C]}, {"a": 1, "c": True}, True),
        ({**A, "anyOf": [B, C]}, {"a": 1, "c": True, "d": 1}, False),
        ({**A, "required": [], "anyOf": [B, C]}, {"a": 1, "b": True}, True),
        ({"type": "object", "properties": {"p": {**A, "anyOf": [B, C]}}}, {"p": {"a": 1, "b": True}}, True),
        ({"allOf": [A, B]}, {"a": 1, "b": True}, True),
        ({"allOf": [A, {**C, "anyOf": [B, {}]}]}, {"a": 1, "b": True, "c": True}, True),
        ({**BASE, "$ref": "#/$defs/B", **A}, {"a": 1, "y": "s"}, True),
        ({**BASE, "allOf": [{"$ref": "#/$defs/B"}, A]}, {"y": "s", "a": 1}, True),
        ({**BASE, "allOf": [{"$ref": "#/$defs/B"}, A]}, {"y": "s", "a": 1, "z": 1}, False),
        ({**A, "required": ["a", "b"]}, {"a": 1, "b": 1}, True),
        ({**A, "enum": [{"a": 1, "b": 2}]}, {"a": 1, "b": 2}, True),
        ({**A, "minProperties": 2, "additionalProperties": True}, {"a": 1, "b": 2}, True),
        # Parts that describe the same member.
        ({"properties": {"p": A}, "allOf": [{"properties": {"p": B}}]}, {"p": {"a": 1, "b": True}}, True),
        ({"items": A, "allOf": [{"items": B}]}, [{"a": 1, "b": True}], True),
        ({"properties": {"ab": A}, "patternProperties": {"^a": B}}, {"ab": {"a": 1, "b": True}}, True),
        (
            {
                "properties": {"p": {"properties": {"q": A}}},
                "allOf": [{"properties": {"p": {"properties": {"q": B}}}}],
            },
            {"p": {"q": {"a": 1, "b": True}}},
            True,
        ),
        # Alternatives of a union: each is closed.
        (PET, {"kind": "cat", "lives": 9}, True),
        (PET, {"kind": "cat", "name": "x"}, False),
        (PET, {"kind": "dog", "name": "x", "more": 1}, False),
        ({"type": "object", "properties": {"p": PET}}, {"p": {"kind": "dog", "d": "d"}}, False),
        ({"oneOf": [{"const": 1}, {"const": 2}]}, 2, True),
        ({"oneOf": [{"type": "integer", "maximum": 3}, {"type": "integer", "minimum": 5}]}, 9, True),
        # References keep their meaning.
        (
            {**A, "properties": {"a": {"type": "integer"}, "next": {"$ref": "#"}}},
            {"a": 1, "next": {"a": 2}},
            True,
        ),
        ({"components": {"X": A}, "$ref": "#/components/X"}, {"a": 1}, True),
        ({"$id": "urn:x", "$defs": {"X": A}, "$ref": "urn:x#/$defs/X"}, {"a": 1}, True),
        ({"$defs": {"X": {**A, "$anchor": "x"}}, "$ref": "#x"}, {"a": "1"}, False),
        ({"$defs": {"a/b": A}, "$ref": "#/$defs/a~1b"}, {"a": 1}, True),
        # Names and ends.
        ({"type": "object", "propertyNames": {"enum": ["u", "v"]}}, {"v": 1}, True),
        ({"type": "object", "propertyNames": {"enum": ["u", "v"]}}, {"w": 1}, False),
        ({"type": "object", "minProperties": 2}, {"a": 1, "b": 1}, True),
        ({"type": "object", "minProperties": 2}, {"a": 1, "a ": 1}, True),
        ({"type": "string", "format": "path"}, "/tmp/x", True),
        ({"type": "array", "uniqueItems": False}, [1, 1], True),
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, 10**17, True),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, 0, False),
        ({"type": "number", "exclusiveMinimum": -1.5, "exclusiveMaximum": -1}, -1, False),
        ({"type": "number", "maximum": 1e300}, 0.25, True),
    ],
    ids=str,
)
def test_what_is_allowed(vocabulary: Vocabulary, nano: Any, schema: Any, value: Any, right: bool) -> None:
    writer = compiled(vocabulary, schema)
    tokens = nano.engine.tokenizer.encode(json.dumps(value))
    written = all(token in writer.allowed() and writer.add(token) for token in tokens)
    assert (written and writer.matcher.is_accepting()) is right
    for seed in range(3):
        checked(schema, compiled(vocabulary, schema).draw(seed))


@pytest.mark.parametrize(
    ("schema", "part"),
    [
        ({"type": "array", "uniqueItems": True}, "a list instead of a set"),
        ({"type": "object", "patternProperties": {"^a": {}}, "minProperties": 2}, "minProperties"),
        ({"contains": {"const": 1}}, "'contains'"),
        ({"not": {"const": 1}}, "'not'"),
        ({"if": {"const": 1}, "then": {}}, "'if'"),
        ({"dependentRequired": {"a": ["b"]}}, "'dependentRequired'"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "use 'anyOf'"),
        ({"oneOf": [A, B]}, "use 'anyOf'"),
        ({"$ref": "#/$defs/X"}, "does not exist"),
        ({"$ref": "https://example.org/x.json"}, "not part of the schema"),
        ({"type": "nonsense"}, "the name of a type"),
        ({"required": "a"}, "a list of names"),
        ({"properties": []}, "an object"),
        ({"anyOf": []}, "a list"),
        ({"items": "x"}, "not a schema"),
        ({"minimum": "1"}, "a number"),
        ({"exclusiveMaximum": []}, "a number or, in draft 4"),
        ({"type": "integer", "minimum": 10**19}, "1e-30 to 1e18"),
        ({"exclusiveMaximum": -1e300}, "1e-30 to 1e18"),
        ({"type": "number", "maximum": 1e-300}, "1e-30 to 1e18"),
        (
            {"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/B"}, "B": {"$ref": "#/$defs/A"}}},
            "to itself",
        ),
        ({"properties": {"deep": {"not": {}}}}, "'not'"),
    ],
    ids=str,
)
def test_what_is_refused_says_why(schema: Any, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        schemas.grammar(schema)


def test_the_work_of_rewriting_has_a_bound() -> None:
    parts: dict[str, Any] = {"d0": {"type": "object", "properties": {"k": {"type": "string"}}}}
    for level in range(8):
        parts[f"d{level + 1}"] = {"anyOf": [{"$ref": f"#/$defs/d{level}"}] * 12}
    several: dict[str, Any] = {"properties": {"k": {"enum": ["a"]}}}
    for _ in range(300):
        several = {"allOf": [several, {"properties": {"k": {"enum": ["b"]}}}]}
    begin = time.process_time()
    for schema in (
        {"$defs": parts, "oneOf": [{"$ref": "#/$defs/d8"}, {"$ref": "#/$defs/d7"}]},
        {"allOf": [{"anyOf": [{"properties": {f"{i}": {}}}] * 6} for i in range(300)]},
        {"oneOf": [{"const": number} for number in range(64)]},
        several,
    ):
        with contextlib.suppress(ValueError, RecursionError):
            schemas.grammar(schema)
    assert time.process_time() - begin < 5


# --- bounds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "token", "most"),
    [
        ({"type": "integer"}, b"1", 19),
        ({"type": "integer", "minimum": 0}, b"1", 19),
        ({"type": ["integer", "null"]}, b"1", 19),
        ({"type": "number"}, b"1", 19),
        ({}, b"1", 19),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, b"7", 19),
    ],
    ids=str,
)
def test_numbers_end(vocabulary: Vocabulary, schema: Any, token: bytes, most: int) -> None:
    writer = compiled(vocabulary, schema)
    digit = ids(vocabulary)[token]
    count = 0
    while not writer.matcher.is_stopped() and digit in writer.allowed():
        writer.add(digit)
        count += 1
        assert count <= most
    assert count == most


@pytest.mark.parametrize("start", [b"0.", b"1e", b"1E-"])
def test_fractions_and_exponents_end(vocabulary: Vocabulary, start: bytes) -> None:
    for schema in ({"type": "number"}, {"type": "number", "minimum": 0, "maximum": 1}, {"type": "object"}):
        writer = compiled(vocabulary, schema)
        text = (b'{"a": ' if schema["type"] == "object" else b"") + start
        known = ids(vocabulary)
        allowed = all(
            known[bytes([byte])] in writer.allowed() and writer.add(known[bytes([byte])]) for byte in text
        )
        if allowed:
            digits = 0
            while known[b"0"] in writer.allowed():
                writer.add(known[b"0"])
                digits += 1
            assert digits <= 17 if start == b"0." else digits <= 3


@pytest.mark.parametrize(
    ("schema", "opening", "cycle"),
    [
        ({"type": "array", "items": {"enum": ["r"]}}, "[", '"r", '),
        ({"type": "array"}, "[", "1, "),
        ({"type": "array"}, "[", '"a", "b", '),
        ({}, "", "["),
        ({"type": "object"}, "", '{"a": '),
        ({"type": "object"}, "{", '"a": 1, '),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "{", '"a": 1, '),
    ],
    ids=str,
)
def test_repetition_ends(vocabulary: Vocabulary, nano: Any, schema: Any, opening: str, cycle: str) -> None:
    writer = compiled(vocabulary, schema)
    known = ids(vocabulary)
    for count, byte in enumerate((opening + cycle * 200).encode()):
        token = known[bytes([byte])]
        if token not in writer.allowed():
            assert count > 3
            break
        writer.add(token)
    else:
        raise AssertionError("it went on")
    writer.draw(0)  # and an end can be reached


def test_no_name_twice(vocabulary: Vocabulary) -> None:
    schema = {"type": "object", "minProperties": 3, "additionalProperties": {"type": "boolean"}}
    for seed in range(20):
        pairs: list[Any] = []
        json.loads(compiled(vocabulary, schema).draw(seed), object_pairs_hook=pairs.extend)
        names = [name for name, _ in pairs]
        assert len(set(names)) == len(names) >= 3


# --- pydantic -----------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED, BLUE = "red", "blue"


class Cat(pydantic.BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]
    colour: Colour


class Tree(pydantic.BaseModel):
    value: int
    children: list[Tree] = pydantic.Field(default=[], max_length=2)


class Inner(pydantic.BaseModel):
    name: str
    colour: Colour | None = None


class Base(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    id: int = pydantic.Field(ge=0)


def model(**fields: Any) -> type[pydantic.BaseModel]:
    return pydantic.create_model("M", **{name: (kind, ...) for name, kind in fields.items()})


Word = Annotated[str, pydantic.StringConstraints(pattern="^[a-z]{2,6}$")]
MODELS = {
    "plain": model(name=str, age=int, ratio=float, good=bool),
    "optional": model(a=int | None, b=Inner | None, c=str | int | None),
    "enum and literal": model(colour=Colour, size=Literal["s", "m", 3], none=None),
    "paths and bytes": model(path=pathlib.Path, data=bytes, secret=pydantic.SecretStr),
    "times": model(at=datetime.datetime, day=datetime.date, time=datetime.time, long=datetime.timedelta),
    "addresses": model(id=uuid.UUID, ip=ipaddress.IPv4Address, site=pydantic.AnyUrl),
    "decimal": model(price=decimal.Decimal),
    "constrained": model(
        word=Word,
        few=Annotated[list[Word], pydantic.Field(min_length=1, max_length=2)],
        part=Annotated[float, pydantic.Field(gt=0, lt=1)],
        step=Annotated[int, pydantic.Field(multiple_of=5)],
    ),
    "mappings": model(
        counts=dict[str, int], by_colour=dict[Colour, int], by_word=dict[Word, bool], any=dict[str, Any]
    ),
    "tuples": model(pair=tuple[int, str], many=tuple[int, ...]),
    "nested": model(inner=Inner, several=list[Inner], deep=dict[str, list[Inner]]),
    "union": model(pet=Cat | Dog, pets=list[Cat | Dog]),
    "discriminated": model(pet=Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]),
    "recursive": Tree,
    "closed": Base,
    "anything": model(value=Any, items=list[Any]),
}


@pytest.mark.parametrize("name", MODELS)
def test_pydantic_models(vocabulary: Vocabulary, name: str) -> None:
    schema = MODELS[name].model_json_schema()
    for seed in range(4):
        checked(schema, compiled(vocabulary, schema).draw(seed))


def test_pydantic_models_as_tools(vocabulary: Vocabulary) -> None:
    """All of them in one request: each keeps its own definitions."""
    tools = [
        Tool.model_validate(
            {"type": "function", "function": {"name": f"f{n}", "parameters": kind.model_json_schema()}}
        )
        for n, kind in enumerate(MODELS.values())
    ]
    called = set()
    for seed in range(40):
        text = Writer(vocabulary, schemas.call_grammar(tools)).draw(seed).decode()
        assert text.startswith(OPEN)
        assert text.endswith(CLOSE)
        call = json.loads(text[len(OPEN) : -len(CLOSE)])
        called.add(call["name"])
        number = int(call["name"][1:])
        checked(tools[number].function.parameters, json.dumps(call["arguments"]).encode())
    assert len(called) > 5


@pytest.mark.parametrize(
    "function",
    [
        {},
        {"parameters": {}},
        {"parameters": {"type": "object"}},
        {"parameters": {"type": "object", "properties": {}}},
        {"parameters": {"title": "T", "type": "object"}},
    ],
)
def test_a_tool_without_parameters_has_no_arguments(vocabulary: Vocabulary, function: Any) -> None:
    tool = Tool.model_validate({"type": "function", "function": {"name": "now", **function}})
    for seed in range(3):
        text = Writer(vocabulary, schemas.call_grammar([tool])).draw(seed).decode()
        assert text == f'{OPEN}{{"name": "now", "arguments": {{}}}}{CLOSE}'
