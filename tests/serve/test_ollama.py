"""Ollama's API with its official client."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

ollama = pytest.importorskip("ollama")

QUESTION: list[Any] = [{"role": "user", "content": "What is your name?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
SHORT = {"temperature": 0, "num_predict": 24}


@pytest.fixture(scope="module")
def client(server: Any) -> Any:
    return ollama.Client(host=server.url, trust_env=False)


def test_chat(server: Any, client: Any) -> None:
    reply = client.chat(model="nano", messages=QUESTION, options=SHORT)
    same = server.openai().chat.completions.create(
        model="nano", messages=QUESTION, temperature=0, max_tokens=24
    )
    assert reply.message.content == same.choices[0].message.content
    assert reply.done
    assert reply.done_reason == same.choices[0].finish_reason
    assert (reply.prompt_eval_count, reply.eval_count) == (
        same.usage.prompt_tokens,
        same.usage.completion_tokens,
    )
    assert reply.total_duration == reply.prompt_eval_duration + reply.eval_duration > 1e5
    lines = list(client.chat(model="nano:latest", messages=QUESTION, options=SHORT, stream=True))
    assert "".join(line.message.content for line in lines) == reply.message.content
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1].eval_count == reply.eval_count


def test_generate(server: Any, client: Any) -> None:
    asked = {"model": "nano", "prompt": QUESTION[0]["content"], "options": SHORT}
    reply = client.generate(system="Be brief.", **asked)
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert reply.response == client.chat(model="nano", messages=messages, options=SHORT).message.content
    assert "".join(line.response for line in client.generate(stream=True, system="Be brief.", **asked)) == (
        reply.response
    )
    raw = client.generate(model="nano", prompt="The capital of", raw=True, options=SHORT)
    same = server.openai().completions.create(
        model="nano", prompt="The capital of", temperature=0, max_tokens=24
    )
    assert raw.response == same.choices[0].text


def test_streams_by_default(server: Any) -> None:
    with server.client() as http:
        answer = http.post("/api/chat", json={"model": "nano", "messages": QUESTION, "options": SHORT})
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert json.loads(answer.text.splitlines()[-1])["done"]


def test_options_apply(client: Any) -> None:
    def say(**options: Any) -> Any:
        return client.chat(model="nano", messages=QUESTION, options={"num_predict": 24, **options})

    greedy = say(temperature=0).message.content
    assert say(top_k=1).message.content == greedy
    assert say(seed=3, temperature=1).message.content == say(seed=3, temperature=1).message.content
    stop = greedy[5:9]
    assert say(temperature=0, stop=[stop]).message.content == greedy[: greedy.index(stop)]
    assert say(temperature=0, num_predict=2).done_reason == "length"
    assert say(temperature=0, repeat_penalty=90.0, presence_penalty=2.0).message.content != greedy
    assert say(temperature=0, num_predict=10**6).message.content.startswith(greedy)
    assert say(temperature=0, num_ctx=4096, num_thread=2, repeat_last_n=3).message.content == greedy


def test_unknown_options_are_reported(server: Any) -> None:
    body = {"model": "nano", "messages": QUESTION, "options": {**SHORT, "mirostat": 1, "num_gpu": 1}, "x": 1}
    with server.client() as http:
        answer = http.post("/api/chat", json=body)
    assert answer.headers["x-ignored-fields"] == "x, options.mirostat"


@pytest.mark.parametrize("stream", [False, True])
def test_formats(client: Any, stream: bool) -> None:
    for form in (SCHEMA, "json"):
        reply = client.chat(model="nano", messages=QUESTION, format=form, options=SHORT, stream=stream)
        text = "".join(line.message.content for line in reply) if stream else reply.message.content
        assert text.startswith("{")
        if form is SCHEMA:
            jsonschema.validate(json.loads(text), SCHEMA)
    assert client.generate(model="nano", prompt="x", format=SCHEMA).response.startswith('{"colour"')
    assert client.generate(model="nano", prompt="x", raw=True, format=SCHEMA).response.startswith("{")


def test_tools(client: Any) -> None:
    def paint(colour: str) -> str:
        """Paint the wall.

        Args:
            colour: of the paint
        """
        return colour

    called = {"function": {"name": "paint", "arguments": {"colour": "red"}}}
    messages = [
        {"role": "user", "content": "Paint it red."},
        {"role": "assistant", "tool_calls": [called]},
        {"role": "tool", "tool_name": "paint", "content": "done"},
    ]
    reply = client.chat(model="nano", messages=messages, tools=[paint], options=SHORT)
    assert reply.message.content or reply.message.tool_calls


def test_a_call_is_sent_whole() -> None:
    """nano rarely calls a tool by itself, and Ollama's API cannot require it."""
    from xverse.serve.apis.ollama import _Reply
    from xverse.serve.calls import CallParser

    reply = _Reply("nano", None)  # type: ignore[arg-type]
    text = 'Yes. <tool_call>{"name": "paint", "arguments": {"colour": "red"}}</tool_call>' * 2
    parser = CallParser({"paint"})
    found: list[Any] = []
    for letter in text:
        for piece in parser.push(letter):
            found += reply._take(piece)
    for piece in parser.end(False):
        found += reply._take(piece)
    found += reply._complete()
    calls = [call["function"] for said in found for call in said["message"].get("tool_calls", [])]
    assert calls == [{"name": "paint", "arguments": {"colour": "red"}}] * 2
    assert "".join(said["message"]["content"] for said in found).startswith("Yes.")


def test_embed(server: Any, client: Any) -> None:
    same = server.openai().embeddings.create(model="nano", input=["one", "two"])
    reply = client.embed(model="nano", input=["one", "two"])
    assert [list(each) for each in reply.embeddings] == [
        pytest.approx(each.embedding, abs=1e-5) for each in same.data
    ]
    assert reply.prompt_eval_count == same.usage.prompt_tokens
    assert client.embeddings(model="nano", prompt="one").embedding == pytest.approx(
        same.data[0].embedding, abs=1e-5
    )
    assert client.embed(model="nano", input=[]).embeddings == []


def test_long_texts_are_truncated(launch: Any) -> None:
    server = launch()
    server.service.runner.engine.context_length = 40
    client = ollama.Client(host=server.url, trust_env=False)
    reply = client.embed(model="nano", input="word " * 100)
    assert (len(reply.embeddings), reply.prompt_eval_count) == (1, 40)
    with pytest.raises(ollama.ResponseError, match="exceed the context"):
        client.embed(model="nano", input="word " * 100, truncate=False)


def test_what_describes_the_model(server: Any, client: Any) -> None:
    (listed,) = client.list().models
    assert listed.model == "nano:latest"
    assert (listed.details.parameter_size, listed.details.family) == ("11.4M", "xverse")
    (running,) = client.ps().models
    assert (running.model, running.digest) == (listed.model, listed.digest)
    assert running.size == listed.size > 11_000_000
    shown = client.show("nano")
    assert shown.modelinfo["general.parameter_count"] == 11_406_592
    assert shown.modelinfo["xverse.context_length"] == server.service.context
    assert "Human: " in shown.template
    assert "completion" in shown.capabilities
    with server.client() as http:
        version = http.get("/api/version").json()["version"]
    assert tuple(map(int, version.split("."))) >= (0, 6, 4)


def test_an_empty_request_loads_the_model(client: Any) -> None:
    assert client.generate(model="nano").done_reason == "load"
    assert client.chat(model="nano", messages=[], keep_alive=0).done_reason == "unload"


@pytest.mark.parametrize(
    ("call", "arguments", "status", "text"),
    [
        ("chat", {"model": "other", "messages": QUESTION}, 404, "model 'other' not found"),
        ("chat", {"messages": QUESTION, "think": True}, 400, "does not support thinking"),
        ("chat", {"messages": QUESTION, "options": {"temperature": -1}}, 400, "options.temperature: -1"),
        ("chat", {"messages": QUESTION, "options": {"temperature": "x"}}, 400,
         "options.temperature: must be a number"),
        ("chat", {"messages": QUESTION, "options": {"num_predict": 0}}, 400, "options.num_predict: 0"),
        ("chat", {"messages": QUESTION, "options": {"repeat_penalty": 0.0}}, 400, "options.repeat_penalty"),
        ("chat", {"messages": QUESTION, "format": {"not": {}}}, 400, "format: the schema is not supported"),
        ("generate", {"prompt": "x", "suffix": "y"}, 400, "suffix: is not supported"),
        ("generate", {"prompt": "x", "context": [1]}, 400, "context: is not supported"),
        ("generate", {"prompt": "word " * 20_000}, 400, "prompt: "),
        ("embed", {"input": "x", "dimensions": 3}, 400, "dimensions: "),
        ("show", {"model": "other"}, 404, "model 'other' not found"),
        ("pull", {"model": "other"}, 400, "does not manage models"),
        ("delete", {"model": "nano"}, 400, "does not manage models"),
    ],
)  # fmt: skip
def test_errors(client: Any, call: str, arguments: dict[str, Any], status: int, text: str) -> None:
    with pytest.raises(ollama.ResponseError) as failed:
        getattr(client, call)(**{"model": "nano", **arguments})
    assert failed.value.status_code == status
    assert failed.value.error.startswith(text) or text in failed.value.error


def test_images_and_formats_are_refused(server: Any) -> None:
    with server.client() as http:
        image = [{"role": "user", "content": "x", "images": ["aGk="]}]
        wrong = http.post("/api/chat", json={"model": "nano", "messages": image})
        assert wrong.json() == {"error": "messages[0].images: is not supported; the model reads text only"}
        wrong = http.post("/api/chat", json={"model": "nano", "messages": QUESTION, "format": "xml"})
        assert wrong.json() == {"error": 'format: must be "json" or a JSON schema'}
        assert http.post("/api/nothing").json() == {"error": "/api/nothing does not exist"}
        assert http.get("/api/chat").status_code == 405


def test_a_stream_that_fails_says_so(launch: Any) -> None:
    server = launch(timeout=0.02)
    client = ollama.Client(host=server.url, trust_env=False)
    with pytest.raises(ollama.ResponseError, match="time limit"):
        list(client.chat(model="nano", messages=QUESTION, stream=True))
