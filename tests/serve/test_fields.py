"""Every field of OpenAI's and vLLM's requests: null, a sample value, a wrong value; and any messages."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params as openai_completion
from openai.types.chat import completion_create_params as openai_chat
from pydantic import ValidationError

from xverse.serve import tools
from xverse.serve.apis.message_blocks import MessagesRequest
from xverse.serve.apis.ollama_bodies import OllamaChatRequest
from xverse.serve.apis.response_items import ResponsesRequest
from xverse.serve.apis.scores import RerankRequest
from xverse.serve.apis.tokens import DetokenizeRequest, TokenizeRequest
from xverse.serve.errors import ApiError, of_validation
from xverse.serve.fields import ELSEWHERE, NO_EFFECT, WITHOUT_EFFECT
from xverse.serve.protocol import ChatRequest, CompletionRequest

CHAT = "/v1/chat/completions"
QUESTION: list[Any] = [{"role": "user", "content": "What is your name?"}]
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

# Values that clients send. The fields of OpenAI's type are all here, and those of vLLM's with an effect.
SAMPLES: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"},
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0.5,
    "function_call": "auto",
    "functions": [{"name": "f", "description": "d", "parameters": {"type": "object"}}],
    "guided_choice": ["yes", "no"],
    "guided_grammar": 'start: "yes" | "no"',
    "guided_json": {"type": "boolean"},
    "guided_regex": "yes|no",
    "ignore_eos": False,
    "logit_bias": {"5": -1, "6": None},
    "logprobs": True,
    "max_completion_tokens": 2,
    "max_tokens": 2,
    "messages": QUESTION,
    "metadata": {"a": "b"},
    "min_p": 0.1,
    "min_tokens": 1,
    "modalities": ["text"],
    "model": "nano",
    "moderation": {},
    "n": 1.0,
    "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "x"},
    "presence_penalty": 0,
    "prompt": "Hello",
    "prompt_cache_key": "k",
    "prompt_cache_options": {},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "repetition_penalty": 1.1,
    "response_format": {"type": "text"},
    "return_token_ids": True,
    "safety_identifier": "s",
    "seed": -1,
    "service_tier": "auto",
    "skip_special_tokens": False,
    "stop": ["a", ""],
    "stop_token_ids": [5],
    "store": True,
    "stream": False,
    "stream_options": {"include_usage": None, "include_obfuscation": False, "continuous_usage_stats": True},
    "structured_outputs": {"regex": "yes|no"},
    "suffix": "",
    "temperature": 0,
    "tool_choice": "none",
    "tools": [TOOL],
    "top_k": -1,
    "top_logprobs": None,
    "top_p": 1,
    "user": "u",
    "verbosity": "low",
    "web_search_options": {},
    "continue_final_message": False,
    "chat_template_kwargs": {"enable_thinking": False},
}
ENDPOINTS: dict[str, tuple[Any, dict[str, Any]]] = {
    CHAT: (ChatRequest, {"messages": QUESTION, "max_tokens": 1}),
    "/v1/completions": (CompletionRequest, {"prompt": "Hello", "max_tokens": 1}),
}


def fields(path: str) -> list[str]:
    kind = ENDPOINTS[path][0]
    official = (openai_chat if kind is ChatRequest else openai_completion).CompletionCreateParamsBase
    return sorted({*official.__annotations__, *kind.model_fields, *NO_EFFECT})


WALK = [(path, name) for path in ENDPOINTS for name in fields(path)]


@pytest.mark.parametrize(("path", "name"), WALK)
def test_null_is_absent_and_values_of_clients_pass(path: str, name: str) -> None:
    kind, body = ENDPOINTS[path]
    sample = SAMPLES.get(name, {"any": "thing"})
    if name == "logprobs" and kind is CompletionRequest:
        sample = 1
    assert kind.model_validate({**body, name: sample}).ignored == ()
    if name not in ("messages", "prompt"):
        with_null, without = kind.model_validate({**body, name: None}), kind.model_validate(body)
        assert name == "max_tokens" or with_null == without


def test_samples_are_answered(server: Any) -> None:
    together = {"n", "messages", "prompt", "tools", "functions", "function_call", "tool_choice", "best_of"}
    with server.client() as client:
        for path, (kind, body) in ENDPOINTS.items():
            for name in [each for each in fields(path) if each not in together and each in SAMPLES]:
                sample = 1 if name == "logprobs" and kind is CompletionRequest else SAMPLES[name]
                answer = client.post(path, json={**body, name: sample})
                assert answer.status_code == 200, (name, answer.text)
                assert "x-ignored-fields" not in answer.headers


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BLOCKS = [
    {"type": "text", "text": "x", "cache_control": {}},
    {"type": "tool_result", "tool_use_id": "c", "content": "y", "is_error": False},
    {"type": "tool_use", "id": "c", "name": "f", "input": {}},
]
# Bodies with objects inside, and the fields that they need.
NESTED: list[tuple[Any, dict[str, Any], set[str]]] = [
    (
        ChatRequest,
        {
            "messages": [{"role": "assistant", "content": "x", "tool_calls": [CALL]}],
            "tools": [TOOL],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {}, "strict": True},
            },
            "structured_outputs": {"json_object": True},
            "stream_options": {"include_usage": True},
        },
        {"messages", "role", "function", "name", "schema"},
    ),
    (
        ResponsesRequest,
        {
            "input": [
                {"type": "message", "id": "m", "role": "user", "content": "x", "status": "completed"},
                {"type": "function_call", "id": "i", "call_id": "c", "name": "f", "arguments": ""},
                {"type": "function_call_output", "id": "o", "call_id": "c", "output": "y"},
            ],
            "tools": [{"type": "function", "name": "f", "parameters": {}, "strict": True}],
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}, "verbosity": "low"},
            "metadata": {"a": "b"},
            "tool_choice": "auto",
            "include": [],
            "truncation": "auto",
        },
        {"input", "role", "content", "name", "call_id"},
    ),
    (
        MessagesRequest,
        {
            "model": "nano",
            "max_tokens": 1,
            "messages": [{"role": "user", "content": BLOCKS}],
            "system": [{"type": "text", "text": "s"}],
            "tool_choice": {"type": "auto"},
            "tools": [{"type": "custom", "name": "f", "description": "d", "input_schema": {}}],
            "output_config": {"format": {"type": "json_schema", "schema": {}}},
        },
        {"model", "max_tokens", "messages", "role", "name", "text", "input_schema", "schema"},
    ),
    (
        OllamaChatRequest,
        {
            "model": "nano",
            "messages": [{"role": "user", "content": "x", "images": [], "tool_calls": [CALL]}],
            "options": {"seed": 1, "stop": ["x"], "num_ctx": 5},
            "tools": [TOOL],
            "think": False,
        },
        {"model", "role", "function", "name"},
    ),
    (
        RerankRequest,
        {"query": "q", "documents": ["d"], "top_n": 1, "return_documents": True},
        {"query", "documents"},
    ),
]


def with_nulls(value: Any, needed: set[str]) -> Iterator[Any]:
    """Copies of a body in which one field is null, at every place."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        copies = [None] if isinstance(value, dict) and key not in needed else []
        for copy in [*copies, *with_nulls(part, needed)]:
            yield {**value, key: copy} if isinstance(value, dict) else [*value[:key], copy, *value[key + 1 :]]
    if isinstance(value, dict):
        yield {**value, "anything": None}


def test_null_is_absent_at_every_depth() -> None:
    for kind, body, needed in NESTED:
        copies = list(with_nulls(body, needed))
        assert len(copies) > 2
        for copy in copies:
            typed = kind in (MessagesRequest, ResponsesRequest)  # blocks and items by their types
            if not typed or '"type": null' not in json.dumps(copy):
                kind.model_validate(copy)


WRONG = ("x", "", 5, -7, 1.5, True, [], {}, [1], [None], ["x"], [{}], {"type": "x"}, {"a": 1}, [[1.5]])


@pytest.mark.parametrize(("path", "name"), WALK)
def test_errors_use_the_words_of_the_api(path: str, name: str) -> None:
    """They begin with the field's path and its rule follows, without pydantic's words."""
    kind, body = ENDPOINTS[path]
    for wrong in WRONG:
        try:
            kind.model_validate({**body, name: wrong})
        except (ValidationError, ApiError) as error:
            found = error if isinstance(error, ApiError) else of_validation(error.errors()[0])
            assert str(found).startswith(f"{found.param}: ")
            assert re.fullmatch(rf"{name}([\[.].*)?", found.param or "")
            assert found.code
            assert not re.search(r"Input|valid dict|pydantic|__|_type|not valid$", str(found)), str(found)


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
         "messages[0].content[1]", "'image_url' are not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
         "messages[0].content[0]", "reads text only"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]},
         "messages[0].content[0].text", "required field is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
         "messages[0].content[0].text", "must be text"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "must be text or a list"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "required field is missing"),
        ({"messages": QUESTION, "tool_choice": "requierd"}, "tool_choice", "must be 'none', 'auto'"),
        ({"messages": QUESTION, "tool_choice": {"type": "custom"}}, "tool_choice.type", "not supported"),
        ({"messages": QUESTION, "tools": [{"type": "function"}]}, "tools[0].function", "missing"),
        ({"messages": QUESTION, "tools": [{"type": "custom"}]}, "tools[0].type", "must be 'function'"),
        ({"messages": QUESTION, "stop": [1]}, "stop[0]", "must be text"),
        ({"messages": QUESTION, "stop": ["a"] * 17}, "stop", "the limit is 16"),
        ({"messages": QUESTION, "logit_bias": {"5": "x"}}, "logit_bias.5", "must be a number"),
        ({"messages": QUESTION, "modalities": ["audio"]}, "modalities[0]", "must be 'text'"),
        ({"messages": QUESTION, "temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"messages": QUESTION, "maxTokens": 1}, "maxTokens", "did you mean 'max_tokens'?"),
        ({"messages": QUESTION, "guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "exclusive"),
        ({"messages": QUESTION, "structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs.regex",
         "structured_outputs.json and structured_outputs.regex"),
        ({"messages": QUESTION, "tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "required",
         "tools": []}}, "tool_choice", "no tools to call"),
        ({"messages": QUESTION, "functions": [TOOL["function"]], "function_call": {"name": "g"}},
         "function_call", "one of the tools (f)"),
        ({"messages": QUESTION, "max_tokens": 10**4000}, "max_tokens", "…"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(server: Any, body: dict[str, Any], param: str, text: str) -> None:
    with server.client() as client:
        answer = client.post(CHAT, json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert text in error["message"]
    if param == "prompt":
        assert "prompt_ids" not in error["message"]


def test_unknown_fields_are_ignored_and_reported(server: Any) -> None:
    unknown = {"mirostat": 2, "typical_p": 0.5, "use_beam_search": False, "ü,\r\n": 1, "nothing": None}
    with server.client() as client:
        answer = client.post(CHAT, json={"messages": QUESTION, "max_tokens": 1, **unknown})
        assert answer.status_code == 200
        assert answer.headers["x-ignored-fields"] == "mirostat, typical_p, use_beam_search, %C3%BC%2C%0D%0A"
        streamed = client.post(CHAT, json={"messages": QUESTION, "max_tokens": 1, "foo": 1, "stream": True})
        assert streamed.headers["x-ignored-fields"] == "foo"


def test_names_of_other_servers_are_not_misspellings() -> None:
    for kind, body in ENDPOINTS.values():
        found = kind.model_validate({**body, **dict.fromkeys(ELSEWHERE, 1)})
        assert set(found.ignored) == set(ELSEWHERE) - kind.model_fields.keys()


def test_the_documentation_lists_what_has_no_effect() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "api.md").read_text(encoding="utf-8")
    for reason, names in WITHOUT_EFFECT.items():
        assert f"| {', '.join(f'`{name}`' for name in names)} | {reason} |" in page


# Replies of this and other servers, sent back.
MESSAGES: list[dict[str, Any]] = [
    {"role": "assistant", "content": "Hi", "annotations": None, "audio": None, "function_call": None,
     "refusal": None, "tool_calls": None, "reasoning_content": "…", "provider_specific_fields": {"a": 1}},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c", "index": 0, "type": "function", "function": {"name": "f", "arguments": "", "x": 1}}]},
    {"role": "assistant", "tool_calls": [{"id": None, "function": {"name": "f", "arguments": '{"a":'}}]},
    {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
    {"role": "assistant", "tool_calls": [{"type": "custom", "custom": {"name": "f", "input": "ls"}}]},
    {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    {"role": "assistant", "tool_calls": [{"id": 5, "function": {"name": "f"}}], "content": [
        {"type": "thinking", "thinking": "…", "signature": "s"}, {"type": "text", "text": "Hi"}]},
    {"role": "assistant", "refusal": "No."},
    {"role": "function", "name": "f", "content": "1"},
    {"role": "tool", "content": "", "name": "f"},
    {"role": "tool", "tool_call_id": "c", "content": None},
    {"role": "developer", "content": "Be brief."},
    {"role": "system", "content": []},
    {"role": "user", "name": None, "content": [{"type": "text", "text": "x", "cache_control": {}}, "y"]},
]  # fmt: skip
TEXTS = ("", " ", "What?", "你好", "<tool_call>", "\n\n", "{}")


@given(
    st.lists(
        st.sampled_from(MESSAGES)
        | st.fixed_dictionaries(
            {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "function"])},
            optional={
                "content": st.none()
                | st.sampled_from(TEXTS)
                | st.lists(st.sampled_from(TEXTS).map(lambda text: {"type": "text", "text": text})),
                "name": st.none() | st.just("n"),
                "tool_calls": st.none() | st.just([]) | st.just(MESSAGES[1]["tool_calls"]),
            },
        ),
        min_size=1,
        max_size=8,
    ),
    st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_conversation_is_written(server: Any, messages: list[dict[str, Any]], with_tools: bool) -> None:
    """Every text is in the prompt, in its order, and the prompt ends with the assistant's turn."""
    body = ChatRequest.model_validate({"messages": messages, "tools": [TOOL] if with_tools else None})
    offered = tools.offered_tools(body)
    ids = server.service.chat_ids(body.messages, offered, False)
    prompt = server.service.tokenizer.decode(ids, skip_special=False)
    assert prompt.endswith("Assistant: ")
    at = 0
    for message in body.messages:
        for text in (message.text(), *(call.name for call in message.calls() if message.role == "assistant")):
            at = prompt.index(text, at) + len(text)


def test_messages_of_replies_are_accepted(server: Any) -> None:
    with server.client() as client:
        for message in MESSAGES:
            answer = client.post(CHAT, json={"messages": [*QUESTION, message], "max_tokens": 1})
            assert answer.status_code == 200, (message, answer.text)


def test_counts_in_errors_are_true(server: Any) -> None:
    """Also those of long texts: clients trim by them."""
    text = "a b " * 100_000
    expected = len(server.service.tokenizer.encode("Human: ")) + len(
        server.service.tokenizer.encode(text + "\n\n")
    )
    expected += len(server.service.tokenizer.encode("Assistant: "))
    with server.client() as client:
        answer = client.post(CHAT, json={"messages": [{"role": "user", "content": text}]})
        assert f"messages: {expected} tokens exceed the context of 8192" in answer.json()["error"]["message"]
        answer = client.post(CHAT, json={"messages": QUESTION, "max_tokens": 9000})
        assert answer.json()["error"]["param"] == "max_tokens"
        large = {"function": {"name": "g", "description": "word " * 9000}}
        answer = client.post(CHAT, json={"messages": QUESTION, "tools": [large]})
        assert re.search(r"\d+ of them describe tools", answer.json()["error"]["message"])


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [1] * 400_000},
        {"messages": [{"role": "user"}] * 200_000},
        {"messages": [{"role": "user", "content": [{"type": "text"}] * 100_000}]},
        {"messages": QUESTION, **{f"k{number}": 1 for number in range(60_000)}},
        {"messages": QUESTION, "logit_bias": {str(number): "x" for number in range(60_000)}},
        {"messages": QUESTION, "tools": [[]] * 100_000},
        {"prompt": [1] * 300_000 + ["x"]},
    ],
)
def test_wrong_bodies_cost_no_more_than_reading_them(body: dict[str, Any]) -> None:
    kind = CompletionRequest if "prompt" in body else ChatRequest
    text = json.dumps(body)
    begin = time.process_time()
    json.loads(text)
    read = time.process_time() - begin
    begin = time.process_time()
    with pytest.raises((ValidationError, ApiError)) as raised:
        kind.model_validate(body)
    if isinstance(raised.value, ValidationError):
        assert len(raised.value.errors()) == 1
    assert time.process_time() - begin < 0.1 + 3 * read


def test_tokenize_counts_conversations(server: Any) -> None:
    asked = {"messages": QUESTION, "tools": [TOOL], "max_tokens": 1}
    with server.client() as client:
        counted = client.post(
            "/tokenize", json={"messages": QUESTION, "tools": [TOOL], "model": "nano"}
        ).json()
        used = client.post(CHAT, json=asked).json()["usage"]
        assert counted["count"] == used["prompt_tokens"] == len(counted["tokens"])
        assert counted["max_model_len"] == 8192
        pieces = client.post("/tokenize", json={"prompt": "Hello 你好", "return_token_strs": True}).json()
        assert len(pieces["token_strs"]) == pieces["count"]
        assert client.post("/detokenize", json={"tokens": pieces["tokens"]}).json()["prompt"] == "Hello 你好"
        assert client.post("/tokenize", json={}).json()["error"]["param"] == "prompt"
    for kind in (TokenizeRequest, DetokenizeRequest):
        assert kind.model_validate({"tokens": [], "prompt": "x", "add_special_tokens": True}) is not None


def test_addresses_that_are_wrong(server: Any) -> None:
    with server.client() as client:
        for path, hint in (
            ("/chat/completions", CHAT),
            ("/models", "/v1/models"),
            ("/completions", "/v1/completions"),
        ):
            answer = client.post(path, json={})
            assert answer.status_code == 404
            assert f"use {hint}" in answer.json()["error"]["message"]
        unknown = ["/v1/audio/speech", "/v1/fine_tuning/jobs", "/v1/responses/x/y", "/nothing"]
        for path in (*unknown, "/v1/files"):
            answer = client.get(path)
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == ("unknown_path" if path in unknown else "batches_off")
        for method, path in (("GET", CHAT), ("DELETE", "/v1/models"), ("POST", "/health")):
            answer = client.request(method, path)
            assert answer.status_code == 405
            assert answer.json()["error"]["code"] == "method_not_allowed"
        answer = client.post(CHAT, content=json.dumps({"messages": QUESTION}))
        assert answer.status_code == 415
        assert "Content-Type: application/json" in answer.json()["error"]["message"]
