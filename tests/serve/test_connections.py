"""Connections that are slow, stalled, or too many, and the server's end while they are open."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests import forkserver

QUESTION = [{"role": "user", "content": "What is your name?"}]
CHAT = "/v1/chat/completions"
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
# Requests of which a part never arrives, by the part.
HALVES = {
    "nothing": "",
    "half a line": "POST /v1/ch",
    "no end of the head": HEAD,
    "no body": HEAD + "Content-Length: 100\r\n\r\n",
    "half a body": HEAD + 'Content-Length: 100\r\n\r\n{"messages": ',
    "half a chunk": HEAD + "Transfer-Encoding: chunked\r\n\r\n40\r\n{",
    "no last chunk": HEAD + "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n",
    "a second request": "GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /hea",
}


def connect(url: str, text: str = "") -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(text.encode())
    return connection


def received(connection: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    data = b""
    with connection:
        while part := connection.recv(65536):
            data += part
    return data


def until_replying(connection: socket.socket) -> None:
    """The first event comes before the engine has the request."""
    data = b""
    while data.count(b"data: ") < 3:
        data += connection.recv(65536)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xverse.serve.connections.HEAD_SECONDS", 1.0)
    monkeypatch.setattr("xverse.serve.guard.BODY_SECONDS", 1.0)


def test_half_sent_requests_are_closed(server: Any, impatient: None) -> None:
    begin = time.monotonic()
    open_ones = {name: connect(server.url, text) for name, text in HALVES.items()}
    for name, connection in open_ones.items():
        data = received(connection)
        assert time.monotonic() - begin < 30, name
        assert b" 408 " in data, name
        assert json.loads(data.rpartition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout", name
    assert time.monotonic() - begin >= 0.9


def test_a_body_that_trickles_is_closed_and_one_that_flows_is_not(server: Any, impatient: None) -> None:
    slow = connect(server.url, HEAD + "Content-Length: 1000\r\n\r\n")

    def trickle() -> None:
        for _ in range(300):
            slow.sendall(b" ")
            time.sleep(0.1)

    with pytest.raises(OSError):  # noqa: PT011 - reset or broken pipe
        trickle()
    body = json.dumps({"messages": QUESTION, "max_tokens": 2}).encode().ljust(40_000)
    steady = connect(server.url, HEAD + f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n")
    for at in range(0, len(body), 4000):  # 2 s in all
        steady.sendall(body[at : at + 4000])
        time.sleep(0.2)
    assert received(steady).startswith(b"HTTP/1.1 200 ")


def test_a_long_reply_has_no_such_deadline(server: Any, impatient: None) -> None:
    body = {"messages": QUESTION, "stream": True, "logit_bias": {"3": -100}, "max_tokens": 100}
    begin = time.monotonic()
    with server.client() as client:
        assert client.post(CHAT, json=body).text.rstrip().endswith("[DONE]")
        while time.monotonic() - begin < 1.5:
            assert client.post(CHAT, json={**body, "max_tokens": 20}).status_code == 200


@pytest.fixture
def process() -> Iterator[Any]:
    """``process(descriptors)``: a server with so many file descriptors at most."""
    started: list[subprocess.Popen[str]] = []

    def start(descriptors: int) -> tuple[subprocess.Popen[str], str]:
        code = (
            f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({descriptors}, {descriptors}))\n"
            "import sys; from xverse.cli import main; sys.exit(main())"
        )
        command = [sys.executable, "-c", code, "serve"]
        flags = ["--port", "0", "--threads", "1", "--max-cache-tokens", "9000", "--page", "none"]

        pipe = subprocess.PIPE
        running = forkserver.Popen([*command, *flags], stdout=pipe, stderr=pipe, text=True)
        started.append(running)
        assert running.stdout is not None
        return running, running.stdout.readline().split()[-1]

    yield start
    for running in started:
        running.kill()
        running.wait()


def test_few_descriptors(process: Any) -> None:
    """More connections than descriptors: others are served, and the log stays short."""
    running, url = process(128)
    held = []
    for _ in range(200):
        try:
            held.append(connect(url, HEAD))
        except OSError:
            break
    begin = time.monotonic()
    assert httpx.get(url + "/health", trust_env=False, timeout=60).status_code == 200
    assert time.monotonic() - begin < 30
    body = {"messages": QUESTION, "max_tokens": 3}
    assert httpx.post(url + CHAT, json=body, trust_env=False, timeout=60).status_code == 200
    running.send_signal(signal.SIGTERM)
    assert running.wait(20) == 0
    for connection in held:
        connection.close()
    log = running.stderr.read()
    assert "Traceback" not in log
    assert len(log) < 4000


@pytest.mark.parametrize("replying", [False, True])
def test_sigterm_waits_for_replies_and_not_for_stalled_connections(process: Any, replying: bool) -> None:
    running, url = process(1024)
    held = [connect(url, text) for text in HALVES.values()]
    body = {"messages": QUESTION, "stream": True, "logit_bias": {"3": -100}, "max_tokens": 300}
    if replying:
        data = json.dumps(body).encode()
        held.append(connect(url, HEAD + f"Content-Length: {len(data)}\r\n\r\n" + data.decode()))
        until_replying(held[-1])
    else:
        time.sleep(0.3)
    running.send_signal(signal.SIGTERM)
    if replying:
        assert b"[DONE]" in received(held.pop())
    assert running.wait(20) == 0
    for connection in held:
        connection.close()
    assert "Traceback" not in running.stderr.read()


def test_a_second_interrupt_ends_at_once_with_a_line(process: Any) -> None:
    running, url = process(1024)
    body = json.dumps({"messages": QUESTION, "stream": True, "logit_bias": {"3": -100}, "max_tokens": 7000})
    held = connect(url, HEAD + f"Content-Length: {len(body)}\r\n\r\n" + body)
    until_replying(held)
    running.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert running.poll() is None
    running.send_signal(signal.SIGINT)
    assert running.wait(20) == 130
    held.close()
    log = running.stderr.read()
    assert "waiting for 1 running reply" in log
    assert "1 reply was cut off" in log
    assert "Traceback" not in log
