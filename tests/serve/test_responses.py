"""``/v1/responses`` with OpenAI's official client."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

from xverse.serve.apis.response_store import ResponseStore

QUESTION = "What is your name?"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "size": {"type": "integer", "maximum": 99}},
    "required": ["colour", "size"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "paint",
    "description": "Paints a wall",
    "parameters": SCHEMA,
    "strict": True,
}
SHORT: dict[str, Any] = {"model": "nano", "temperature": 0, "max_output_tokens": 24}


@pytest.fixture(scope="module")
def client(server: Any) -> Any:
    return server.openai()


def test_text(server: Any, client: Any) -> None:
    reply = client.responses.create(input=QUESTION, instructions="Be brief.", metadata={"a": "b"}, **SHORT)
    same = client.chat.completions.create(
        model="nano",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=24,
    )
    assert reply.output_text == same.choices[0].message.content
    assert reply.usage.input_tokens == same.usage.prompt_tokens
    assert reply.usage.output_tokens == same.usage.completion_tokens
    assert reply.metadata == {"a": "b"}
    assert reply.instructions == "Be brief."
    (item,) = reply.output
    assert (item.type, item.role) == ("message", "assistant")
    cut = same.choices[0].finish_reason == "length"
    assert reply.status == item.status == ("incomplete" if cut else "completed")


def test_a_cut_reply_is_incomplete(client: Any) -> None:
    reply = client.responses.create(input=QUESTION, **{**SHORT, "max_output_tokens": 2})
    assert reply.status == "incomplete"
    assert reply.incomplete_details.reason == "max_output_tokens"


def test_streaming_events_add_up_to_the_response(client: Any) -> None:
    whole = client.responses.create(input=QUESTION, **SHORT)
    events = list(client.responses.create(input=QUESTION, stream=True, **SHORT))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:-1] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    final = events[-1].response
    assert kinds[-1] == f"response.{final.status}"
    assert text == whole.output_text == final.output_text
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_the_client_streams_and_parses(client: Any) -> None:
    import pydantic

    class Wall(pydantic.BaseModel):
        colour: str = pydantic.Field(pattern="^(red|blue)$")
        sure: bool

    with client.responses.stream(input=QUESTION, text_format=Wall, model="nano") as stream:
        final = stream.get_final_response()
    assert isinstance(final.output_parsed, Wall)
    assert isinstance(
        client.responses.parse(input=QUESTION, text_format=Wall, model="nano").output_parsed, Wall
    )


def test_json_schema_and_json_object(client: Any) -> None:
    form = {"type": "json_schema", "name": "wall", "schema": SCHEMA, "strict": True}
    reply = client.responses.create(input=QUESTION, model="nano", text={"format": form})
    jsonschema.validate(json.loads(reply.output_text), SCHEMA)
    assert reply.text.format.name == "wall"
    free = client.responses.create(input=QUESTION, text={"format": {"type": "json_object"}}, **SHORT)
    assert free.output_text.startswith("{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "paint"}])
def test_a_tool_is_called_and_its_result_returned(client: Any, choice: Any) -> None:
    asked = {"model": "nano", "tools": [TOOL], "tool_choice": choice, "temperature": 0}
    reply = client.responses.create(input="Paint it.", **asked)
    (call,) = reply.output
    assert (call.type, call.name, call.status) == ("function_call", "paint", "completed")
    jsonschema.validate(json.loads(call.arguments), SCHEMA)
    assert reply.tools[0].name == "paint"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    by_id = client.responses.create(input=[result], previous_response_id=reply.id, tools=[TOOL], **SHORT)
    items = [{"role": "user", "content": "Paint it."}, call.model_dump(exclude_none=True), result]
    by_items = client.responses.create(input=items, tools=[TOOL], **SHORT)
    assert by_id.output_text == by_items.output_text
    assert by_id.usage.input_tokens == by_items.usage.input_tokens


def test_a_tool_call_streams(client: Any) -> None:
    asked = {"model": "nano", "tools": [TOOL], "tool_choice": "required", "temperature": 0}
    events = list(client.responses.create(input="Paint it.", stream=True, **asked))
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert "".join(deltas) == done.arguments == events[-1].response.output[0].arguments
    assert len(deltas) > 1
    assert "response.output_text.delta" not in [event.type for event in events]


def test_logprobs(client: Any) -> None:
    reply = client.responses.create(
        input=QUESTION, include=["message.output_text.logprobs"], top_logprobs=2, **SHORT
    )
    logprobs = reply.output[0].content[0].logprobs
    assert len(logprobs) >= 5
    assert all(len(token.top_logprobs) >= 2 and token.logprob <= 0 for token in logprobs)


def test_a_conversation_continues_by_id(client: Any) -> None:
    first = client.responses.create(input="My name is Ada.", instructions="Be brief.", **SHORT)
    second = client.responses.create(input="And yours?", previous_response_id=first.id, **SHORT)
    same = client.responses.create(
        input=[
            {"role": "user", "content": "My name is Ada."},
            {"role": "assistant", "content": [{"type": "output_text", "text": first.output_text}]},
            {"role": "user", "content": [{"type": "input_text", "text": "And yours?"}]},
        ],
        **SHORT,
    )
    assert second.output_text == same.output_text  # instructions are not carried over
    third = client.responses.create(input="Again?", previous_response_id=second.id, **SHORT)
    assert third.usage.input_tokens > second.usage.input_tokens
    reference = {"type": "item_reference", "id": first.output[0].id}
    asked = [
        {"role": "user", "content": "My name is Ada."},
        reference,
        {"role": "user", "content": "And yours?"},
    ]
    assert client.responses.create(input=asked, **SHORT).output_text == second.output_text


def test_stored_responses_are_read_and_deleted(client: Any) -> None:
    items = [{"role": "user", "content": each} for each in ("one", "two", "three")]
    reply = client.responses.create(input=items, **SHORT)
    assert client.responses.retrieve(reply.id) == reply
    listed = client.responses.input_items.list(reply.id, order="asc", limit=2)
    assert [item.content[0].text for item in listed] == ["one", "two", "three"]  # over two pages
    (newest, *_) = client.responses.input_items.list(reply.id).data
    assert newest.content[0].text == "three"
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(reply.id)
    client.responses.delete(reply.id)
    for read in (client.responses.retrieve, client.responses.input_items.list, client.responses.delete):
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            read(reply.id)
    with pytest.raises(openai.NotFoundError) as failed:
        client.responses.create(input="x", previous_response_id=reply.id, **SHORT)
    assert failed.value.param == "previous_response_id"


def test_not_stored(client: Any) -> None:
    reply = client.responses.create(input=QUESTION, store=False, **SHORT)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(reply.id)


def test_the_store_is_bounded_and_divided_by_key() -> None:
    def response(number: int) -> dict[str, Any]:
        return {"id": f"r{number}", "output": [{"id": f"m{number}", "text": "x" * 1000}]}

    store = ResponseStore(most_bytes=5000)
    for number in range(20):
        store.put(response(number), [], [], "a")
    kept = [number for number in range(20) if store.get(f"r{number}", "a")]
    assert kept == list(range(16, 20))
    assert store.item("m19", "a")
    assert not store.item("m19", "b")
    assert not store.item("m3", "a")
    assert store.get("r19", "b") is None
    assert not store.delete("r19", "b")
    store.put({"id": "large", "output": ["x" * 9000]}, [], [], "a")
    assert store.get("large", "a") is None


def test_truncation_drops_the_oldest_turns(launch: Any) -> None:
    server = launch()
    server.service.runner.engine.context_length = 300
    client = server.openai()
    turns = [{"role": "user", "content": f"{number} " + "word " * 20} for number in range(40)]
    with pytest.raises(openai.BadRequestError) as failed:
        client.responses.create(input=turns, **SHORT)
    assert failed.value.code == "context_length_exceeded"
    assert failed.value.param == "input"
    assert "300" in failed.value.message
    reply = client.responses.create(input=turns, truncation="auto", **SHORT)
    assert 200 < reply.usage.input_tokens <= 300 - 24


@pytest.mark.parametrize(
    ("body", "status", "param", "text"),
    [
        ({}, 400, "input", "missing"),
        ({"input": []}, 400, "input", "at least 1"),
        ({"input": 5}, 400, "input", "must be text or a list of items"),
        ({"input": [{"type": "computer_call"}]}, 400, "input[0].type", "not supported"),
        ({"input": [{"role": "user"}]}, 400, "input[0].content", "missing"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400,
         "input[0].content[0]", "reads text only"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, 400, "input[0].call_id", "missing"),
        ({"input": [{"type": "item_reference", "id": "msg_x"}]}, 404, "input[0].id", "does not exist"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, 400, "tools[0].type", "'web_search'"),
        ({"input": "x", "tools": [{"type": "function"}]}, 400, "tools[0].name", "missing"),
        ({"input": "x", "tool_choice": "required"}, 400, "tool_choice", "no tools"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, 400, "text.format.schema", "missing"),
        ({"input": "x", "text": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, 400,
         "text.format", "not supported"),
        ({"input": "x", "max_output_tokens": 0}, 400, "max_output_tokens", "out of range"),
        ({"input": "x", "max_output_tokens": 10**6}, 400, "max_output_tokens", "too large"),
        ({"input": "x", "temperature": -1}, 400, "temperature", "out of range"),
        ({"input": "x", "background": True}, 400, "background", "not supported"),
        ({"input": "x", "conversation": "c"}, 400, "conversation", "previous_response_id"),
        ({"input": "x", "metadata": {"a": 1}}, 400, "metadata.a", "text"),
        ({"input": "x", "metadata": {"a" * 65: ""}}, 400, f"metadata.{'a' * 64}", "64 characters"),
        ({"input": "x", "metadata": {"a": "x" * 513}}, 400, "metadata.a", "512"),
        ({"input": "x", "metadata": dict.fromkeys("abcdefghijklmnopq", "")}, 400, "metadata", "limit is 16"),
        ({"input": "x", "include": ["x"]}, 400, "include[0]", "must be one of"),
        ({"input": "x", "previous_response_id": "x"}, 404, "previous_response_id", "does not exist"),
        ({"input": "x", "model": "other"}, 404, "model", "does not exist"),
        ({"input": "x", "instruction": "y"}, 400, "instruction", "did you mean 'instructions'?"),
    ],
)  # fmt: skip
def test_errors(server: Any, body: dict[str, Any], status: int, param: str, text: str) -> None:
    with server.client() as http:
        answer = http.post("/v1/responses", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert text in error["message"]
    assert error["message"].startswith(param)


def test_every_field_of_the_official_client_is_known(server: Any) -> None:
    from openai.types.responses import response_create_params as official

    from xverse.serve.apis.response_items import ResponsesRequest

    names = official.ResponseCreateParamsBase.__annotations__.keys() | {"stream"}
    values: dict[str, Any] = {name: {} for name in names} | {"input": "x", "model": "nano"}
    values |= dict.fromkeys(("background", "store", "stream"), False) | {"include": [], "tools": []}
    values |= {"truncation": "auto", "top_logprobs": 1, "user": "u", "instructions": "", "temperature": 1}
    values |= {"top_p": 1, "max_output_tokens": 3, "parallel_tool_calls": True, "tool_choice": "auto"}
    values |= {"previous_response_id": None}
    assert ResponsesRequest.model_validate(values).ignored == ()
    for name in names - {"input"}:
        assert ResponsesRequest.model_validate({"input": "x", name: None}).ignored == ()
    with server.client() as http:
        answer = http.post("/v1/responses", json={"input": "x", "max_output_tokens": 1, "foo": 1})
    assert answer.headers["x-ignored-fields"] == "foo"


def test_a_stream_that_fails_says_so(launch: Any) -> None:
    server = launch(timeout=0.02)
    events = list(server.openai().responses.create(input=QUESTION, stream=True, model="nano"))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error"
    assert "time limit" in events[-1].response.error.message
