"""Faults of clients and machines, and the server's response."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import pytest
import torch

QUESTION = [{"role": "user", "content": "What is your name?"}]
CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("body", "param", "part"),
    [
        ({"messages": QUESTION, "temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"messages": QUESTION, "top-p": 1}, "top-p", "did you mean 'top_p'"),
        ({"messages": QUESTION, "temperature": True}, "temperature", "must be a number"),
        ({"messages": QUESTION, "temperature": "0.5"}, "temperature", "must be a number"),
        ({"messages": QUESTION, "logit_bias": {"9" * 5000: 1}}, "logit_bias", "token ids"),
        ({"messages": QUESTION, "temperature": 1000}, "temperature", "out of range"),
        ({"messages": QUESTION, "temperature": "hot"}, "temperature", "must be a number"),
        ({"messages": QUESTION, "top_p": 0}, "top_p", "out of range"),
        ({"messages": QUESTION, "n": 1000}, "n", "at most 16"),
        ({"messages": QUESTION, "max_tokens": 0}, "max_tokens", "out of range"),
        ({"messages": QUESTION, "max_tokens": 10**9}, "max_tokens", "is too large"),
        (
            {"messages": QUESTION, "max_tokens": 1, "max_completion_tokens": 10**9},
            "max_completion_tokens",
            "is too large",
        ),
        ({"messages": [{"role": "user", "content": "a b " * 50_000}]}, "messages", "100012 tokens exceed"),
        ({"messages": []}, "messages", "at least 1"),
        ({}, "messages", "missing"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "must be 'system'"),
        ({"messages": QUESTION, "model": "gpt-5"}, "model", "'gpt-5' does not exist"),
        ({"messages": QUESTION, "seed": 1.5}, "seed", ""),
        ({"messages": QUESTION, "logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"messages": QUESTION, "logit_bias": {"99999999": 1}}, "logit_bias", "ids must be"),
        ({"messages": QUESTION, "top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"messages": QUESTION, "logprobs": True, "top_logprobs": 99}, "top_logprobs", "out of range"),
        ({"messages": QUESTION, "stop": ["a"] * 99}, "stop", "the limit is 16"),
        ({"messages": QUESTION, "tool_choice": "required"}, "tool_choice", "no tools"),
        (
            {"messages": QUESTION, "response_format": {"type": "xml"}},
            "response_format.type",
            "must be 'text'",
        ),
        (
            {"messages": QUESTION, "response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "missing",
        ),
        (
            {
                "messages": QUESTION,
                "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}},
            },
            "response_format",
            "is not supported",
        ),
        (
            {
                "messages": QUESTION,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"enum": ["x" * 30 + str(n) for n in range(5000)]}},
                },
            },
            "response_format",
            "the limit is 65536",
        ),
    ],
)
def test_what_is_wrong_is_named(server: Any, body: dict[str, Any], param: str | None, part: str) -> None:
    with server.client() as client:
        answer = client.post(CHAT, json=body)
    assert answer.status_code == (404 if param == "model" else 400)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert part in error["message"]
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize("content", [b"{", b"[1, 2", b'{"messages": "\xff\xfe"}', b"null", b""])
def test_bodies_that_are_no_json(server: Any, content: bytes) -> None:
    with server.client() as client:
        answer = client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_bodies_that_are_too_large(server: Any) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 10_000_000}]}).encode()

    def pieces() -> Any:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    for content in (body, pieces()):  # with Content-Length and without
        with server.client() as client:
            answer = client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"


def test_other_paths_and_methods(server: Any) -> None:
    with server.client() as client:
        assert client.get("/nothing").status_code == 404
        assert client.get("/nothing").json()["error"]["message"]
        assert client.get(CHAT).status_code == 405
        assert client.get("/v1/models/other").status_code == 404


def test_other_host_names_are_refused(server: Any) -> None:
    with server.client() as client:
        assert client.get("/health", headers={"Host": "evil.example"}).status_code == 421
        assert client.get("/health", headers={"Host": "localhost:99"}).status_code == 200
        answer = client.options(CHAT, headers={"Origin": "http://evil.example"})
        assert "access-control-allow-origin" not in answer.headers


def test_pages_of_others_may_not_ask(server: Any, launch: Any) -> None:
    body = {"messages": QUESTION, "max_tokens": 3}
    with server.client() as client:
        for origin in ("http://evil.example", "null", "https://evil.example:443", "nonsense"):
            answer = client.post(CHAT, json=body, headers={"Origin": origin})
            assert answer.status_code == 403
            assert answer.json()["error"]["code"] == "origin"
        assert client.post(CHAT, json=body, headers={"Origin": server.url}).status_code == 200
        assert client.post(CHAT, json=body).status_code == 200
    friends = launch(guard={"origins": ["https://friend.example"]})
    with friends.client() as client:
        for origin, status in (("https://friend.example", 200), ("https://evil.example", 403)):
            assert client.post(CHAT, json=body, headers={"Origin": origin}).status_code == status


def test_answers_tell_browsers_to_be_careful(server: Any) -> None:
    with server.client() as client:
        headers = client.get("/health").headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


def test_websockets_are_refused(server: Any) -> None:
    head = "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    key = "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall((head + key).encode())
        assert b" 101 " not in connection.recv(1000).split(b"\r\n")[0]


def test_what_was_said_is_logged_only_where_asked(launch: Any, capfd: Any) -> None:
    body = {"messages": [{"role": "user", "content": "a secret"}], "max_tokens": 3}
    for contents in (False, True):
        running = launch(guard={"log": True, "contents": contents})
        with running.client() as client:
            answer = client.post(CHAT, json=body)
            client.get("/health")
        logged: list[dict[str, Any]] = []

        def arrived(logged: list[dict[str, Any]] = logged) -> bool:
            logged += [json.loads(line) for line in capfd.readouterr().err.splitlines()]
            return len(logged) == 1

        running.until(arrived)
        assert [line["path"] for line in logged] == [CHAT]  # successful probes are not logged
        assert ("a secret" in json.dumps(logged)) == contents
        if contents:
            assert logged[0]["request"] == body
            assert logged[0]["response"] == answer.json()


def test_keys(launch: Any) -> None:
    import openai

    running = launch(guard={"keys": ["first-key", "second-key"]})
    for key in ("first-key", "second-key"):
        assert running.openai(key).models.list().data
    for key in ("first", "first-keys", "wrong"):
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            running.openai(key).models.list()
    with running.client() as client:
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Basic first-key"}).status_code == 401
        assert client.get("/health").status_code == 200


def opened(server: Any, body: dict[str, Any]) -> socket.socket:
    """A connection that sent a request and reads nothing."""
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_a_client_that_leaves_frees_its_blocks(server: Any, stream: bool, when: str) -> None:
    server.until(server.idle)
    long = [{"role": "user", "content": "word " * 1500}] if when == "prefill" else QUESTION
    bias = {"3": -100}  # otherwise it would continue
    connection = opened(server, {"messages": long, "stream": stream, "logit_bias": bias, "max_tokens": 4000})
    server.until(lambda: not server.idle())
    if when == "decode":
        before = server.service.runner.tokens
        server.until(lambda: server.service.runner.tokens > before + 5)
    connection.close()
    server.until(server.idle, seconds=10)


def test_a_slow_reader_holds_nobody_up(server: Any) -> None:
    body = {"messages": QUESTION, "stream": True, "logit_bias": {"3": -100}, "max_tokens": 2000}
    connection = opened(server, body)
    try:
        reply = server.openai().chat.completions.create(model="nano", messages=QUESTION, max_tokens=20)
        assert reply.choices[0].message.content is not None
    finally:
        connection.close()
    server.until(server.idle)


def test_a_client_that_reads_nothing_is_given_up(launch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        pytest.skip("needs Linux")
    monkeypatch.setattr("xverse.serve.server.STALLED_SECONDS", 2)
    running = launch(stop_ids=())
    body = {"messages": QUESTION, "stream": True, "logprobs": True, "top_logprobs": 20, "n": 8}
    connection = opened(running, {**body, "max_tokens": 2000})  # 40 MB, more than the sockets hold
    running.until(lambda: running.service.runner.open == 8)
    begin = time.monotonic()
    running.until(lambda: running.service.runner.open == 0, seconds=60)
    assert time.monotonic() - begin > 2
    connection.close()
    running.until(running.idle)


DEEP: dict[str, Any] = {}
for _ in range(400):
    DEEP = {"type": "object", "properties": {"a": DEEP}}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "((((a{1,100}){1,100}){1,100}){1,100})"},
        {"type": "string", "pattern": "(a|aa|aaa)*" * 100},
        {"type": "string", "pattern": "[ab]*a[ab]{40}"},
        {"type": "string", "pattern": ".*a.{5000}"},
        {"type": "string", "pattern": "(?=a)b"},
        {"type": "string", "minLength": 10**9},
        {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
        {"type": "integer", "multipleOf": 999999937},
        {"type": "integer", "minimum": 10**300},
        {"type": "object", "properties": {f"k{n}": {"type": "string", "maxLength": 50} for n in range(1200)}},
        {"allOf": [{"anyOf": [{"properties": {f"{i}.{j}": {}}} for j in range(6)]} for i in range(12)]},
        {"$ref": "#"},
        {"$ref": "http://192.0.2.1/schema.json"},
        {"$ref": "file:///etc/passwd"},
        {"enum": []},
        {"not": {}},
        DEEP,
    ],
)
def test_hostile_schemas(server: Any, schema: dict[str, Any]) -> None:
    """Refused by name or enforced, quickly and without delaying others."""
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    body = {"messages": QUESTION, "max_tokens": 20, "response_format": form}
    begin = time.monotonic()
    with server.client() as client:
        answer = client.post(CHAT, json=body)
        assert time.monotonic() - begin < 10
        assert answer.status_code in (200, 400), answer.text
        if answer.status_code == 400:
            assert answer.json()["error"]["param"] == "response_format"
        assert client.get("/health").status_code == 200


def test_bodies_that_are_nested_without_end(server: Any) -> None:
    for content in ("[" * 200_000, '{"messages":' * 50_000, '{"a":' * 900 + "1" + "}" * 900):
        with server.client() as client:
            answer = client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]


def test_a_full_queue_says_when_to_come_again(launch: Any) -> None:
    running = launch(max_waiting=1)
    body = {"messages": QUESTION, "stream": True, "logit_bias": {"3": -100}, "max_tokens": 3000}
    connections = [opened(running, body) for _ in range(9)]  # eight run, one waits
    running.until(lambda: running.service.runner.open == 9)
    with running.client() as client:
        for stream in (True, False):
            answer = client.post(CHAT, json={"messages": QUESTION, "stream": stream})
            assert answer.status_code == 429
            assert int(answer.headers["Retry-After"]) > 0
            assert answer.json()["error"]["code"] == "queue_full"
    for connection in connections:
        connection.close()
    running.until(running.idle)
    with running.client() as client:
        assert client.post(CHAT, json={"messages": QUESTION, "max_tokens": 3}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_reply_that_takes_too_long_ends(launch: Any, stream: bool) -> None:
    running = launch(timeout=0.5)
    body = {"messages": QUESTION, "stream": stream, "logit_bias": {"3": -100}, "max_tokens": 4000}
    with running.client() as client:
        answer = client.post(CHAT, json=body)
    if stream:
        error = json.loads(answer.text.rstrip().splitlines()[-1].removeprefix("data: "))["error"]
    else:
        assert answer.status_code == 504
        error = answer.json()["error"]
    assert error["code"] == "timeout"
    running.until(running.idle)


def test_an_exception_in_a_step_fails_its_requests_and_no_others(launch: Any) -> None:
    running = launch()
    engine = running.service.runner.engine
    step = engine.step
    engine.step = lambda: (_ for _ in ()).throw(RuntimeError("out of luck"))
    with running.client() as client:
        answer = client.post(CHAT, json={"messages": QUESTION})
        assert answer.status_code == 500
        assert "out of luck" in answer.json()["error"]["message"]
        engine.step = step
        assert client.post(CHAT, json={"messages": QUESTION, "max_tokens": 3}).status_code == 200
        assert 'xverse_engine_failures_total{model_name="nano"} 1.0' in client.get("/metrics").text
    running.until(running.idle)


def test_more_replies_than_it_ever_takes_are_refused(launch: Any) -> None:
    running = launch(max_waiting=1)
    with running.client() as client:
        answer = client.post("/v1/completions", json={"prompt": ["x"] * 10, "max_tokens": 1})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "n"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_requests_that_had_not_arrived_hear_of_the_death(launch: Any) -> None:
    running = launch()
    entered, go = threading.Event(), threading.Event()

    def die() -> None:
        entered.set()
        go.wait(10)
        raise SystemExit("killed")

    running.service.runner.engine.step = die
    found: list[int] = []

    def ask() -> None:
        with running.client() as client:
            found.append(client.post(CHAT, json={"messages": QUESTION}).status_code)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    threads[0].start()
    assert entered.wait(10)
    for thread in threads[1:]:
        thread.start()
    running.until(lambda: running.service.runner.open == 3)
    go.set()
    for thread in threads:
        thread.join(10)
    assert found == [503] * 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nothing_to_do_is_not_stuck(launch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xverse.serve.runner._STUCK", 0.2)
    server = launch()
    with server.client() as client:
        assert client.post(CHAT, json={"messages": QUESTION, "max_tokens": 3}).status_code == 200
        server.until(server.idle)
        time.sleep(0.4)
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "error",
    [
        SystemExit("killed"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
    ],
    ids=repr,
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_turns_health_red(launch: Any, error: BaseException) -> None:
    """Also one whose device fails: every later step would fail, too."""
    running = launch()
    told = threading.Event()
    running.service.runner.on_death = told.set

    def die() -> None:
        raise error

    running.service.runner.engine.step = die
    with running.client() as client:
        answer = client.post(CHAT, json={"messages": QUESTION})
        assert answer.status_code == 503
        assert told.wait(5)
        assert client.get("/health/live").status_code == 503
        assert client.get("/health").status_code == 503
        assert client.post(CHAT, json={"messages": QUESTION}).status_code == 503
