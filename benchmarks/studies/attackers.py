"""Clients that harm a server if they can: expensive schemas, requests that never end, wrong bodies."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import time
from typing import Any

from xverse.bench.client import post

PATH = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "What is your name?"}]
_HEAD = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def _nested(depth: int) -> dict[str, Any]:
    part: dict[str, Any] = {}
    for _ in range(depth):
        part = {"type": "object", "properties": {"a": part}}
    return part


def hostile_schema(chance: random.Random) -> dict[str, Any]:
    """A schema of at most 64 KB that is expensive to compile or to follow; rarely the same twice."""
    number = chance.randint(1_000_000, 40_000_000)
    letters = chance.sample("abcdefghijklmnopqrstuvwxyz", 20)
    kinds: list[dict[str, Any]] = [
        {"type": "integer", "multipleOf": number},
        {"type": "number", "multipleOf": number / 1000},
        {"allOf": [{"type": "integer", "multipleOf": number % 1000 + at} for at in range(2, 8)]},
        {"allOf": [{"type": "string", "pattern": f".*{letter}.*"} for letter in letters]},
        {"type": "string", "pattern": "((((a|b){1,100}){1,100}){1,100}){1," + str(number % 90 + 10) + "}"},
        {"type": "string", "pattern": "(a|aa|aaa)*" * (number % 90 + 10)},
        {"type": "string", "pattern": "[ab]*a[ab]{" + str(number % 90 + 10) + "}"},
        {"type": "string", "minLength": number, "maxLength": 2 * number},
        {"type": "array", "items": {"type": "string", "maxLength": number}, "minItems": number},
        {"enum": [f"{chance.random()}" for _ in range(2500)]},
        {"properties": {f"{chance.random()}": {"type": "string", "maxLength": 50} for _ in range(1000)}},
        {"allOf": [{"anyOf": [{"properties": {f"{i}.{j}": {}}} for j in range(6)]} for i in range(12)]},
        {
            "oneOf": [
                {"oneOf": [{"properties": {f"{i}": {"const": j}}} for j in range(30)]} for i in range(30)
            ]
        },
        {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#"}]}}, "$ref": "#/$defs/a"},
        _nested(number % 400),
    ]
    return chance.choice(kinds)


def ask_hostile(port: int, chance: random.Random) -> int | None:
    """The status of the answer; None if this client hung up first."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": hostile_schema(chance)}}
    body = {"messages": QUESTION, "response_format": form, "max_tokens": 30}
    leaves = chance.random() < 0.5
    connection = None
    try:
        connection, answer = post(port, body, timeout=2.0 if leaves else 300.0)
        answer.read()
        return int(answer.status)
    except TimeoutError:
        return None
    finally:
        if connection is not None:
            connection.close()


def send_half(port: int, chance: random.Random, end: float) -> None:
    """A part of a request, then nothing or a byte now and then, until the server closes or for a while."""
    body = json.dumps({"messages": QUESTION})
    whole = f"{_HEAD}Content-Length: {len(body)}\r\n\r\n{body}"
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as client:
        at = chance.randint(0, len(whole) - 1)
        client.sendall(whole[:at].encode())
        drips = chance.random() < 0.5
        until = min(end, time.monotonic() + chance.uniform(1, 60))
        while time.monotonic() < until:
            with contextlib.suppress(TimeoutError):
                if not client.recv(4096):
                    return
            if drips and at < len(whole) - 1:
                client.sendall(whole[at : at + 1].encode())
                at += 1


def send_wrong(port: int, chance: random.Random) -> int:
    """The status of the answer to a body that is not a valid request."""
    bodies = [
        json.dumps({"messages": [1] * chance.randint(1, 1_000_000)}),
        json.dumps({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}] * 20_000}),
        "[" * chance.randint(1, 200_000),
        '{"messages": ' * chance.randint(1, 50_000),
        json.dumps({"messages": QUESTION, "stop": ["x"] * 100_000}),
        json.dumps({"messages": QUESTION, "temperature": "hot"}),
        "x" * chance.randint(0, 100_000),
        json.dumps({"messages": [{"role": "user", "content": "word " * chance.randint(100_000, 700_000)}]}),
        " " * chance.randint(0, 5_000_000),
    ]
    body = chance.choice(bodies).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=300) as client:
        with contextlib.suppress(OSError):  # the answer may come before the end of the body
            client.sendall(f"{_HEAD}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        return int(client.makefile("rb").readline().split()[1])
