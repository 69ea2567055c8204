"""``/v1/messages`` with Anthropic's official client."""

from __future__ import annotations

import copy
import json
from typing import Any

import jsonschema
import pytest

anthropic = pytest.importorskip("anthropic")

QUESTION: list[Any] = [{"role": "user", "content": "What is your name?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {"name": "paint", "description": "Paints a wall", "input_schema": SCHEMA}
GREEDY = {"temperature": 0}  # which the client has no argument for since its second version
SHORT: dict[str, Any] = {"model": "nano", "max_tokens": 24, "extra_body": GREEDY}
FORMER = {"anthropic-version": "2023-06-01"}


def connect(server: Any, key: str = "none", **options: Any) -> Any:
    http = anthropic.DefaultHttpxClient(trust_env=False)
    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0, http_client=http, **options)


@pytest.fixture(scope="module")
def client(server: Any) -> Any:
    return connect(server, default_headers=FORMER)


def test_text(server: Any, client: Any) -> None:
    reply = client.messages.create(messages=QUESTION, system="Be brief.", **SHORT)
    same = server.openai().chat.completions.create(
        model="nano",
        messages=[{"role": "system", "content": "Be brief."}, *QUESTION],
        temperature=0,
        max_tokens=24,
    )
    (block,) = reply.content
    assert (reply.type, reply.role, reply.model, block.type) == ("message", "assistant", "nano", "text")
    assert block.text == same.choices[0].message.content
    ended = same.choices[0].finish_reason
    assert reply.stop_reason == {"stop": "end_turn", "length": "max_tokens"}[ended]
    usage = reply.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == same.usage.prompt_tokens
    assert usage.output_tokens == same.usage.completion_tokens
    counted = client.messages.count_tokens(messages=QUESTION, system="Be brief.", model="nano")
    assert counted.input_tokens == same.usage.prompt_tokens


def test_content_as_blocks_is_the_same(client: Any) -> None:
    text = client.messages.create(messages=QUESTION, system="Be brief.", **SHORT)
    blocks = client.messages.create(
        messages=[{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}],
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        **SHORT,
    )
    assert blocks.content == text.content


def test_streaming(client: Any) -> None:
    whole = client.messages.create(messages=QUESTION, **SHORT)
    events = list(client.messages.create(messages=QUESTION, stream=True, **SHORT))
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start"
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "".join(e.delta.text for e in events if e.type == "content_block_delta") == whole.content[0].text
    with client.messages.stream(messages=QUESTION, **SHORT) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_stop_sequences(client: Any, stream: bool) -> None:
    text = client.messages.create(messages=QUESTION, **SHORT).content[0].text
    stop = text[6:9]
    asked = {"messages": QUESTION, "stop_sequences": ["never said", stop], **SHORT}
    if stream:
        with client.messages.stream(**asked) as events:
            reply = events.get_final_message()
    else:
        reply = client.messages.create(**asked)
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", stop)
    assert reply.content[0].text == text[: text.index(stop)]


def test_a_begun_reply_is_continued(client: Any) -> None:
    whole = client.messages.create(messages=QUESTION, **SHORT).content[0].text
    begun = {"role": "assistant", "content": whole[:30]}
    reply = client.messages.create(messages=[*QUESTION, begun], **SHORT)
    assert not reply.content[0].text.startswith(whole[:8])


def test_a_template_that_cannot_continue_a_message(launch: Any) -> None:
    """Other families' templates end every message."""
    server = launch()
    server.service.tokenizer = copy.copy(server.service.tokenizer)
    server.service.tokenizer.template = "{{ messages[0].content }}"
    begun = [*QUESTION, {"role": "assistant", "content": "I am"}]
    with pytest.raises(anthropic.BadRequestError, match="messages: the chat template of this model cannot"):
        connect(server).messages.create(messages=begun, model="nano", max_tokens=5)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "paint"}])
def test_a_tool_is_called_and_its_result_returned(client: Any, choice: Any) -> None:
    asked = {"model": "nano", "max_tokens": 100, "tools": [TOOL]}
    messages: list[Any] = [{"role": "user", "content": "Paint it."}]
    reply = client.messages.create(messages=messages, tool_choice=choice, **asked)
    (block,) = reply.content
    assert (reply.stop_reason, block.type, block.name) == ("tool_use", "tool_use", "paint")
    jsonschema.validate(block.input, SCHEMA)
    result = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "done"}]}
    messages += [{"role": "assistant", "content": reply.content}, {"role": "user", "content": [result]}]
    after = client.messages.create(messages=messages, **asked)
    assert after.content
    failed = {**result, "content": "no paint", "is_error": True}
    messages[-1] = {"role": "user", "content": [failed, {"type": "text", "text": "Why?"}]}
    assert client.messages.create(messages=messages, **asked).content


def test_a_tool_call_streams(client: Any) -> None:
    asked = {"model": "nano", "max_tokens": 100, "tools": [TOOL], "tool_choice": {"type": "any"}}
    events = list(client.messages.create(messages=QUESTION, stream=True, **asked))
    starts = [event.content_block for event in events if event.type == "content_block_start"]
    assert [(block.type, block.name, block.input) for block in starts] == [("tool_use", "paint", {})]
    deltas = [event.delta for event in events if event.type == "content_block_delta"]
    assert {delta.type for delta in deltas} == {"input_json_delta"}
    assert len(deltas) > 1
    jsonschema.validate(json.loads("".join(delta.partial_json for delta in deltas)), SCHEMA)
    assert events[-2].delta.stop_reason == "tool_use"


def test_structured_output(client: Any) -> None:
    config = {"format": {"type": "json_schema", "schema": SCHEMA}}
    reply = client.messages.create(messages=QUESTION, output_config=config, max_tokens=100, model="nano")
    jsonschema.validate(json.loads(reply.content[0].text), SCHEMA)


def test_a_limit_beyond_the_context_is_the_context(launch: Any) -> None:
    server = launch(stop_ids=())
    server.service.runner.engine.context_length = 40
    client = connect(server, default_headers=FORMER)
    reply = client.messages.create(
        messages=QUESTION,
        max_tokens=20_000,
        model="nano",
        extra_headers={"anthropic-beta": "x"},
        extra_body={"unknown_field": 1},
    )
    assert reply.stop_reason == "model_context_window_exceeded"
    assert reply.usage.input_tokens + reply.usage.output_tokens == 40


def test_the_newest_version_has_no_sampling_parameters(server: Any) -> None:
    for client in (connect(server), connect(server, default_headers={"anthropic-version": "2026-10-21"})):
        assert client.messages.create(messages=QUESTION, model="nano", max_tokens=4).content
    for name in ("temperature", "top_p", "top_k"):
        with pytest.raises(anthropic.BadRequestError, match=f"{name}: Extra inputs are not permitted"):
            client.messages.create(messages=QUESTION, model="nano", max_tokens=4, extra_body={name: 1})


def test_models(client: Any) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.type, model.display_name) == ("nano", "model", "nano")
    assert client.models.retrieve("nano").created_at == model.created_at


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"model": "other"}, anthropic.NotFoundError, "not_found_error: model: 'other' does not exist"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "invalid_request_error: max_tokens: must be at"),
        ({"extra_body": {"temperature": 2}}, anthropic.BadRequestError, "invalid_request_error: temper"),
        ({"extra_body": {"top_p": 5}}, anthropic.BadRequestError, "invalid_request_error: top_p: "),
        ({"messages": []}, anthropic.BadRequestError, "invalid_request_error: messages: at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, anthropic.BadRequestError,
         "invalid_request_error: messages[0].role: must be"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, anthropic.BadRequestError,
         "invalid_request_error: messages[0].content[0].type: content blocks of type 'image' are not"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, anthropic.BadRequestError,
         "invalid_request_error: messages[0].content[0].text: required field is missing"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, anthropic.BadRequestError,
         "invalid_request_error: tools[0].type: tools of type 'bash_20250124' are not supported"),
        ({"tools": [{"name": "a"}]}, anthropic.BadRequestError,
         "invalid_request_error: tools[0].input_schema: required field is missing"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "b"}}, anthropic.BadRequestError,
         "invalid_request_error: tool_choice: 'b' is not one of the tools"),
        ({"tool_choice": {"type": "tool"}}, anthropic.BadRequestError,
         "invalid_request_error: tool_choice.name: required field is missing"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}},
         anthropic.BadRequestError, "invalid_request_error: output_config.format: the schema is"),
        ({"extra_body": {"unknown_field": 1}}, anthropic.BadRequestError,
         "invalid_request_error: unknown_field: Extra inputs are not permitted"),
        ({"extra_headers": {"anthropic-version": "2020-01-01"}}, anthropic.BadRequestError,
         "invalid_request_error: anthropic-version: '2020-01-01' is not supported"),
    ],
)  # fmt: skip
def test_errors(client: Any, change: dict[str, Any], kind: Any, text: str) -> None:
    with pytest.raises(kind) as failed:
        client.messages.create(**{"messages": QUESTION, **SHORT, **change})
    body = failed.value.body
    assert body["type"] == "error"
    assert f"{body['error']['type']}: {body['error']['message']}".startswith(text)
    assert body["request_id"]


def test_keys_and_limits(launch: Any) -> None:
    server = launch({"keys": ["secret"], "max_body": 3000}, timeout=0.02)
    with pytest.raises(anthropic.AuthenticationError) as failed:
        connect(server).messages.create(messages=QUESTION, **SHORT)  # the version is not checked yet
    assert failed.value.body["error"]["type"] == "authentication_error"
    client = connect(server, "secret", default_headers=FORMER)
    assert client.messages.count_tokens(messages=QUESTION, model="nano").input_tokens > 5
    bearer = anthropic.Anthropic(
        base_url=server.url,
        auth_token="secret",
        max_retries=0,
        http_client=anthropic.DefaultHttpxClient(trust_env=False),
    )
    assert bearer.messages.count_tokens(messages=QUESTION, model="nano").input_tokens > 5
    with pytest.raises(anthropic.RequestTooLargeError):
        client.messages.create(messages=[{"role": "user", "content": "x" * 4000}], **SHORT)
    with pytest.raises(anthropic.APIStatusError) as late:
        client.messages.create(messages=QUESTION, **SHORT)
    assert (late.value.status_code, late.value.body["error"]["type"]) == (504, "timeout_error")
    with pytest.raises(anthropic.APIStatusError, match="time limit"):
        list(client.messages.create(messages=QUESTION, stream=True, **SHORT))
    with server.client(headers={"x-api-key": "secret"}) as http:
        wrong = http.post("/v1/messages/batches", json={})
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (404, "not_found_error")


def test_every_field_of_the_official_client_is_known() -> None:
    from anthropic.types import message_count_tokens_params, message_create_params

    from xverse.serve.apis.message_blocks import WITHOUT_EFFECT, CountRequest, MessagesRequest

    for official, kind in (
        (message_create_params.MessageCreateParamsBase, MessagesRequest),
        (message_count_tokens_params.MessageCountTokensParams, CountRequest),
    ):
        assert official.__annotations__.keys() <= kind.model_fields.keys() | WITHOUT_EFFECT
