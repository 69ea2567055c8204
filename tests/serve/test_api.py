"""OpenAI's API with its official client, and with curl."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from typing import Any

import httpx
import jsonschema
import pytest

QUESTION: list[Any] = [{"role": "user", "content": "What is your name?"}]


def test_models(server: Any) -> None:
    client = server.openai()
    (model,) = client.models.list().data
    assert model.id == "nano"
    assert client.models.retrieve("nano").owned_by == "xverse"


def test_chat(server: Any) -> None:
    reply = server.openai().chat.completions.create(
        model="nano", messages=QUESTION, temperature=0, max_tokens=30
    )
    (choice,) = reply.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert 0 < reply.usage.completion_tokens <= 30


def test_it_says_what_xverse_chat_says(server: Any) -> None:
    from xverse.chat.session import load_session

    session = load_session(
        "nano", {"temperature": 0.0, "max_new_tokens": 40}, threads=1, notify=lambda _: None
    )
    said = "".join(session.reply(QUESTION[0]["content"]))
    reply = server.openai().chat.completions.create(
        model="nano", messages=QUESTION, temperature=0, max_tokens=40
    )
    assert reply.choices[0].message.content == said


def test_streaming_is_the_same_text_in_pieces(server: Any) -> None:
    asked: dict[str, Any] = {"model": "nano", "messages": QUESTION, "seed": 5, "max_tokens": 40}
    whole = server.openai().chat.completions.create(**asked)
    chunks = list(
        server.openai().chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert len(chunks) > 5
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert [reason for reason in reasons if reason] == [whole.choices[0].finish_reason]


def test_many_at_once_asynchronously(server: Any) -> None:
    import openai

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=server.url + "/v1", api_key="none", http_client=httpx.AsyncClient(trust_env=False)
        ) as client:

            async def one(number: int) -> str:
                stream = await client.chat.completions.create(
                    model="nano",
                    messages=[{"role": "user", "content": "Write a poem."}],
                    seed=number % 3,
                    temperature=2,
                    top_p=1,
                    max_tokens=20,
                    stream=True,
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*map(one, range(12)))

    replies = asyncio.run(run())
    assert replies[:3] == replies[3:6] == replies[6:9] == replies[9:]
    assert len(set(replies)) > 1
    server.until(server.idle)


def test_several_choices(server: Any) -> None:
    asked: dict[str, Any] = {
        "model": "nano",
        "messages": QUESTION,
        "n": 3,
        "seed": 1,
        "temperature": 8,
        "top_p": 1,
        "max_tokens": 20,
    }
    reply = server.openai().chat.completions.create(**asked)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in reply.choices]
    assert len(set(texts)) > 1
    streamed = ["", "", ""]
    for chunk in server.openai().chat.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_logprobs(server: Any) -> None:
    reply = server.openai().chat.completions.create(
        model="nano", messages=QUESTION, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    content = reply.choices[0].logprobs.content
    assert len(content) == reply.usage.completion_tokens
    for token in content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == max(each.logprob for each in token.top_logprobs)
        assert bytes(token.bytes).decode(errors="replace") == token.token


def test_stop_and_bias(server: Any) -> None:
    client = server.openai()
    asked: dict[str, Any] = {"model": "nano", "messages": QUESTION, "temperature": 0, "max_tokens": 30}
    text = client.chat.completions.create(**asked).choices[0].message.content
    stop = text[5:9]
    stopped = client.chat.completions.create(**asked, stop=[stop]).choices[0]
    assert stopped.message.content == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"
    ids = server.service.tokenizer.encode(text)
    biased = client.chat.completions.create(**asked, logit_bias={str(ids[0]): -100}).choices[0]
    assert server.service.tokenizer.encode(biased.message.content)[:1] != ids[:1]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(4))
def test_structured_output_validates(server: Any, seed: int) -> None:
    reply = server.openai().chat.completions.create(
        model="nano",
        messages=QUESTION,
        seed=seed,
        temperature=1.0,
        max_tokens=300,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
    )
    assert reply.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(reply.choices[0].message.content), SCHEMA)


def test_parsed_by_the_client(server: Any) -> None:
    import pydantic

    class Answer(pydantic.BaseModel):
        yes: bool
        number: int = pydantic.Field(ge=0, le=99)

    reply = server.openai().chat.completions.parse(
        model="nano", messages=QUESTION, response_format=Answer, max_tokens=100
    )
    assert isinstance(reply.choices[0].message.parsed, Answer)


def test_json_object(server: Any) -> None:
    reply = server.openai().chat.completions.create(
        model="nano",
        messages=QUESTION,
        temperature=0,
        max_tokens=200,
        response_format={"type": "json_object"},
    )
    if reply.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(reply.choices[0].message.content), dict)
    assert reply.choices[0].message.content.startswith("{")


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "深圳"]}, "days": {"type": "integer", "maximum": 9}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_must_be_called(server: Any, choice: Any, stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": "nano",
        "messages": QUESTION,
        "tools": [TOOL],
        "tool_choice": choice,
        "seed": 1,
        "max_tokens": 200,
    }
    if stream:
        chunks = list(server.openai().chat.completions.create(**asked, stream=True))
        assert all(not chunk.choices[0].delta.content for chunk in chunks)
        pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        pieces[0].function.arguments = "".join(piece.function.arguments for piece in pieces)
        calls, reason = pieces[:1], chunks[-1].choices[0].finish_reason
        assert {piece.index for piece in pieces} == {0}
    else:
        (answer,) = server.openai().chat.completions.create(**asked).choices
        assert answer.message.content is None
        calls, reason = answer.message.tool_calls, answer.finish_reason
    (call,) = calls
    assert reason == "tool_calls"
    assert call.function.name == "weather"
    jsonschema.validate(json.loads(call.function.arguments), TOOL["function"]["parameters"])


def test_the_result_of_a_tool_goes_into_the_conversation(server: Any) -> None:
    messages: list[Any] = [
        *QUESTION,
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    reply = server.openai().chat.completions.create(
        model="nano", messages=messages, tools=[TOOL], tool_choice="none", max_tokens=10
    )
    assert reply.choices[0].message.content is not None


def test_completions(server: Any) -> None:
    client = server.openai()
    text = client.completions.create(model="nano", prompt="The capital", temperature=0, max_tokens=8)
    assert text.choices[0].text
    ids = server.service.tokenizer.encode("The capital")
    same = client.completions.create(model="nano", prompt=ids, temperature=0, max_tokens=8)
    assert same.choices[0].text == text.choices[0].text
    several = client.completions.create(
        model="nano", prompt=["The capital", "One two"], temperature=0, max_tokens=8, n=2
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[1].text == text.choices[0].text
    assert several.usage.prompt_tokens == len(ids) + len(server.service.tokenizer.encode("One two"))
    chunks = client.completions.create(
        model="nano", prompt="The capital", temperature=0, max_tokens=8, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == text.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(server: Any, stream: bool) -> None:
    """As evaluation harnesses use it: log-probabilities of a given text, without generation."""
    asked: dict[str, Any] = {
        "model": "nano",
        "prompt": "The capital of France",
        "echo": True,
        "logprobs": 2,
        "max_tokens": 0,
    }
    if stream:
        (chunk,) = server.openai().completions.create(**asked, stream=True)
        (choice,) = chunk.choices
    else:
        (choice,) = server.openai().completions.create(**asked).choices
    assert choice.text == asked["prompt"]
    assert "".join(choice.logprobs.tokens) == asked["prompt"]
    first, *others = choice.logprobs.token_logprobs
    assert first is None
    assert all(value <= 0 for value in others)
    assert len(others) == len(server.service.tokenizer.encode(asked["prompt"])) - 1
    assert all(len(each) <= 2 for each in choice.logprobs.top_logprobs[1:])
    assert choice.logprobs.text_offset[0] == 0


def test_tokenize_and_back(server: Any) -> None:
    with server.client() as client:
        text = "你好, world! 🙂"
        found = client.post("/tokenize", json={"text": text}).json()
        assert found["count"] == len(found["tokens"])
        assert client.post("/detokenize", json={"tokens": found["tokens"]}).json()["text"] == text
        wrong = client.post("/detokenize", json={"tokens": [10**9]})
        assert wrong.status_code == 400


def test_health_and_metrics(server: Any) -> None:
    with server.client() as client:
        assert client.get("/health").json() == {"status": "ready"}
        assert client.get("/health/live").json() == {"status": "live"}
        server.openai().chat.completions.create(model="nano", messages=QUESTION, max_tokens=5)
        text = client.get("/metrics").text
    for name in (
        'http_requests_total{handler="/v1/chat/completions",method="POST",status="200"}',
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_count",
        "xverse_cache_free_blocks",
        'xverse_ready{model_name="nano"} 1.0',
        "vllm:num_requests_waiting",
    ):
        assert name in text


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl(server: Any) -> None:
    body = json.dumps({"messages": QUESTION, "max_tokens": 5, "stream": True})
    done = subprocess.run(
        ["curl", "-sN", "--noproxy", "*", f"{server.url}/v1/chat/completions",
         "-H", "Content-Type: application/json", "-d", body],
        capture_output=True, text=True, check=True, timeout=240,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: {") for line in lines[:-1])


def test_tokens_that_are_parts_of_a_character(server: Any) -> None:
    """Each has a distinct name, and offsets count the characters of the text."""
    prompt = "😀 a 𠮷b"
    reply = server.openai().completions.create(
        model="nano", prompt=prompt, max_tokens=0, echo=True, logprobs=5
    )
    (choice,) = reply.choices
    assert choice.text == prompt
    found = choice.logprobs
    assert any(token.startswith("bytes:\\x") for token in found.tokens)
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert choice.text[offset : offset + len(token)] == token
    assert all(len(each) >= 5 for each in found.top_logprobs if each is not None)
