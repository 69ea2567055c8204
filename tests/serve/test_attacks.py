"""Schemas that are expensive to compile or to follow, while another client reads a stream."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import httpx
import pytest

from benchmarks.studies.attackers import QUESTION, hostile_schema
from xverse.hardware import process_memory

CHAT = "/v1/chat/completions"
# What stopped the server for good, or until its memory ended.
SCHEMAS: list[dict[str, Any]] = [
    {"type": "integer", "multipleOf": 5_000_011},
    {"type": "integer", "multipleOf": 31_536_000},
    {"allOf": [{"type": "integer", "multipleOf": prime} for prime in (97, 89, 83, 79, 73, 71)]},
    {"allOf": [{"type": "string", "pattern": f".*{letter}.*"} for letter in "abcdefghijklmnopqrst"]},
    {"type": "string", "pattern": "((((a|b){1,1000}){1,1000}){1,1000}){1,1000}"},
    {"type": "array", "minItems": 10**7, "items": {"type": "string", "maxLength": 10**7}},
]


def body(schema: dict[str, Any], tool: bool = False) -> dict[str, Any]:
    if tool:
        function = {"name": "f", "parameters": {"type": "object", "properties": {"x": schema}}}
        tools = [{"type": "function", "function": function}]
        return {"messages": QUESTION, "max_tokens": 20, "tools": tools, "tool_choice": "required"}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    return {"messages": QUESTION, "max_tokens": 20, "response_format": form}


def test_others_go_on(server: Any) -> None:
    lines, gaps, stop = [], [], threading.Event()

    def watch() -> None:
        asked = {"messages": QUESTION, "stream": True, "logit_bias": {"3": -100}, "max_tokens": 4000}
        with server.client() as client, client.stream("POST", CHAT, json=asked) as answer:
            last = time.process_time()  # of the server, which is in this process: others may slow it down
            for line in answer.iter_lines():
                lines.append(line)
                gaps.append(time.process_time() - last)
                last = time.process_time()
                if stop.is_set():
                    return

    def attack(schema: dict[str, Any], tool: bool) -> None:
        with pytest.raises(httpx.ReadTimeout):  # this client leaves
            httpx.post(server.url + CHAT, json=body(schema, tool), timeout=1.5, trust_env=False)

    before = process_memory("VmRSS") or 0
    watcher = threading.Thread(target=watch)
    watcher.start()
    server.until(lambda: len(lines) > 20)
    attackers = [
        threading.Thread(target=attack, args=(schema, tool))
        for schema in SCHEMAS[:4]
        for tool in (False, True)
    ]
    for attacker in attackers:
        attacker.start()
    server.until(lambda: bool(server.service.grammars._running))
    arrived = len(lines)
    with server.client() as client:  # one with a schema of its own is not kept waiting
        begin = time.process_time()
        assert client.post(CHAT, json=body({"enum": ["an", "ordinary", "one"]})).status_code == 200
        assert time.process_time() - begin < 20
    server.until(lambda: len(lines) > arrived + 20)
    for attacker in attackers:
        attacker.join()
    server.until(lambda: not server.service.grammars._running)  # what nobody waits for has ended
    stop.set()
    watcher.join()
    assert max(gaps) < 5
    assert (process_memory("VmRSS") or 0) - before < 200e6


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_each_is_refused_or_enforced(server: Any, number: int) -> None:
    with server.client() as client:
        answer = client.post(CHAT, json=body(SCHEMAS[number]))
        again = time.monotonic()
        assert client.post(CHAT, json=body(SCHEMAS[number])).status_code == answer.status_code
    if answer.status_code != 200:
        assert time.monotonic() - again < 5  # remembered
        error = answer.json()["error"]
        assert error["param"] == "response_format"
        assert error["code"] == "bad_schema"


def test_a_walk_over_expensive_schemas(server: Any) -> None:
    chance = random.Random(1)
    with server.client() as client:
        for _ in range(6):
            answer = client.post(CHAT, json=body(hostile_schema(chance)))
            assert answer.status_code in (200, 400), answer.text
            assert client.get("/health").status_code == 200
    server.until(server.idle)
