"""A server in its own process, and clients that send requests over loopback."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from xverse.config import UserError


@contextmanager
def serving(
    model: str, quantize: str | None, threads: int | None, more: Sequence[str] = ()
) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """Run ``xverse serve``; yields its port and process. Raises UserError if it does not start."""
    flags = ["serve", "--model", model, "--port", "0", "--no-access-log", *more]
    flags += ["--quantize", quantize] if quantize else []
    flags += ["--threads", str(threads)] if threads else []
    environment = {name: value for name, value in os.environ.items() if name != "XVERSE_API_KEY"}
    process = subprocess.Popen(
        [sys.executable, "-m", "xverse.cli", *flags], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise UserError(f"xverse serve exited with code {process.wait()}")
        port = int(line.rsplit(":", 1)[1])
        try:
            while get(port, "/health")[0] != 200:  # it listens before the model is loaded
                time.sleep(0.1)
        except (OSError, http.client.HTTPException):
            raise UserError(f"xverse serve exited with code {process.wait()}") from None
        yield port, process
    finally:
        process.terminate()
        process.wait(60)


@dataclass
class Stream:
    """What one client observed; times in seconds."""

    begun: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    tokens: int = 0
    error: str | None = None
    pieces: list[float] = field(default_factory=list)  # arrival times of pieces of text, mostly of one token

    @property
    def rate(self) -> float:
        return (self.tokens - 1) / max(self.ended - self.begun - self.first, 1e-9)


def together(port: int, bodies: Sequence[dict[str, Any]]) -> list[Stream]:
    """Send all requests at once, each from its own client, and read every stream to its end."""
    streams = [Stream() for _ in bodies]
    threads = [
        threading.Thread(target=_follow, args=(port, body, stream))
        for body, stream in zip(bodies, streams, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = next((stream.error for stream in streams if stream.error), None)
    if failed and len(bodies) == 1:
        raise UserError(f"the server failed: {failed}")
    return streams


def completion(prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """A greedy request for exactly ``new_tokens`` tokens."""
    return {"prompt": prompt, "max_tokens": new_tokens, **_ENDLESS}


def chat(new_tokens: int, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    """The same for a conversation, constrained to a JSON ``schema`` if one is given."""
    body = {"messages": [{"role": "user", "content": "Names?"}], "max_tokens": new_tokens, **_ENDLESS}
    if schema is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
    return body


# Token 3 ends a reply; its logit bias prevents it.
_ENDLESS: dict[str, Any] = {
    "stream": True,
    "temperature": 0,
    "logit_bias": {"3": -100},
    "stream_options": {"include_usage": True},
}


def post(port: int, body: dict[str, Any], timeout: float = 600.0) -> tuple[Any, Any]:
    """The connection and its response, of which only the header has been read."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection, connection.getresponse()


def get(port: int, path: str) -> tuple[int, str]:
    """Status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def _follow(port: int, body: dict[str, Any], stream: Stream) -> None:
    stream.begun = time.perf_counter()
    connection: Any = None
    try:
        connection, answer = post(port, body)
        if answer.status != 200:
            raise UserError(answer.read().decode()[:300])
        for raw in answer:
            line = raw.decode().strip()
            if not line.startswith("data: {"):
                continue
            data = json.loads(line.removeprefix("data: "))
            if "error" in data:
                raise UserError(data["error"]["message"])
            if data.get("usage"):
                stream.tokens = data["usage"]["completion_tokens"]
                continue
            now = time.perf_counter()
            choice = data["choices"][0]
            if not stream.first and (choice.get("text") or choice.get("delta", {}).get("content")):
                stream.first = now - stream.begun
            stream.pieces.append(now)
            stream.ended = now
    except (OSError, http.client.HTTPException, UserError) as error:
        stream.error = str(error) or type(error).__name__
    finally:
        if connection is not None:
            connection.close()
