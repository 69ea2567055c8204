"""Objects that say what a client wants: no name in them is overlooked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

import xverse.serve.app  # noqa: F401  (all classes of options)
from xverse.serve.errors import of_validation
from xverse.serve.fields import Options
from xverse.serve.protocol import ChatRequest

CHAT = "/v1/chat/completions"
QUESTION: list[Any] = [{"role": "user", "content": "What is your name?"}]
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def subclasses(kind: type[Options]) -> Iterator[type[Options]]:
    for each in kind.__subclasses__():
        yield each
        yield from subclasses(each)


@pytest.mark.parametrize("kind", list(subclasses(Options)), ids=lambda kind: kind.__name__)
def test_options_are_not_overlooked(kind: type[Options]) -> None:
    """In an object that says what the client wants, a misspelt name is refused, another one reported."""
    for name in [each for each in kind.names() if len(each) > 4]:
        wrong = name[:2] + name[1:]
        with pytest.raises(ValidationError) as caught:
            kind.model_validate({wrong: 1})
        error = of_validation(caught.value.errors()[0])
        assert (error.param, error.code) == (wrong, "unknown_field")
        assert f"did you mean '{name}'?" in str(error)
    for name in kind.without_effect:
        assert not kind.unknown({name: 1})


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "shema": {}}}},
         "response_format.json_schema.shema", "did you mean 'schema'?"),
        ({"response_format": {"type": "json_schema", "json_schema": {"type": "object"}}},
         "response_format.json_schema.schema", "required field is missing"),
        ({"response_format": {"type": "text", "json_schema": {"schema": {}}}},
         "response_format.json_schema", "needs the type 'json_schema', not 'text'"),
        ({"response_format": {"type": "json_schema", "schema": {}}},
         "response_format.schema", "needs the type 'json_object'"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag",
         "unknown field"),
        ({"stream_options": {"include_usages": True}}, "stream_options.include_usages", "'include_usage'"),
        ({"tools": [{"function": {"name": "f", "paramaters": {}}}]}, "tools[0].function.paramaters",
         "did you mean 'parameters'?"),
        ({"tools": [TOOL], "functions": [TOOL["function"]]}, "functions", "former name"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name", "earlier tool"),
        ({"tools": [{"function": {"name": "f", "parameters": {"type": "array"}}}], "tool_choice": "required"},
         "tools", "tool 'f': the arguments of a call are an object"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "more than the reply may have (4)"),
        ({"guided_regex": "((a{100}){100}){100}"}, "guided_regex", "too much work"),
        ({"guided_grammar": "start: start"}, "guided_grammar", "no text matches it"),
    ],
)  # fmt: skip
def test_nothing_that_shapes_the_reply_is_overlooked(
    server: Any, body: dict[str, Any], param: str, text: str
) -> None:
    with server.client() as client:
        answer = client.post(CHAT, json={"messages": QUESTION, **body})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], text in error["message"]) == (param, True), error
    assert error["code"]


def test_a_format_without_type_has_that_of_its_field() -> None:
    for field, kind in (("json_schema", "json_schema"), ("schema", "json_object"), ("regex", "regex")):
        value: Any = {"json_schema": {"schema": {}}, "schema": {}, "regex": "a"}[field]
        body = ChatRequest.model_validate({"messages": QUESTION, "response_format": {field: value}})
        assert body.response_format.type == kind


def test_unknown_options_are_reported(server: Any) -> None:
    body = {"messages": QUESTION, "max_tokens": 1, "response_format": {"type": "text", "foo": 1}, "bar": 1}
    with server.client() as client:
        assert client.post(CHAT, json=body).headers["x-ignored-fields"] == "bar, response_format.foo"
        many = {"type": "text", **{f"unknown{index}": 1 for index in range(51)}}
        assert client.post(CHAT, json={**body, "response_format": many}).status_code == 400
