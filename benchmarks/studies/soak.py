"""The server under long mixed load, with clients that hang up and clients that attack it: does it return all
memory and cache blocks, and do other streams go on?"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import random
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.studies import attackers
from xverse.bench.client import get, post, serving
from xverse.bench.options import add_quantize, add_threads, positive
from xverse.bench.report import Row, at_most, in_gb, show
from xverse.config import UserError
from xverse.formats import resolve
from xverse.hardware import process_memory
from xverse.log import notice
from xverse.values import add_model

FLAT_TARGET = 0.02  # deviation from the median
GAP_TARGET = 0.5  # seconds between two pieces of a stream, 99th percentile
_WATCHERS = 2  # clients that only measure the gaps of their streams
_WARM = 0.25  # share of the time for warming up
_EVERY = 5.0  # seconds between samples
_CACHE = 20_000  # tokens; small, so that it fills early
_WORDS = [
    "the",
    "sea",
    "a",
    "ship",
    "one",
    "two",
    "海",
    "船",
    "天气",
    "很好",
    "как",
    "дела",
    "하늘",
    "और",
    "नमस्ते",
]


@dataclass
class Tally:
    """Outcomes of requests, by kind."""

    answered: collections.Counter[str] = field(default_factory=collections.Counter)
    left: collections.Counter[str] = field(default_factory=collections.Counter)
    refused: collections.Counter[str] = field(default_factory=collections.Counter)
    failed: list[str] = field(default_factory=list)
    server_errors: collections.Counter[int] = field(default_factory=collections.Counter)
    gaps: list[float] = field(default_factory=list)  # of the watchers' streams, in seconds


def arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_quantize(parser)
    parser.add_argument("--minutes", type=float, default=20.0, metavar="T", help="duration of the load")
    parser.add_argument("--clients", type=positive, default=16, metavar="N", help="concurrent clients")
    parser.add_argument(
        "--leaving", type=float, default=0.3, metavar="P", help="share of requests hung up on"
    )
    text = "clients that send expensive schemas, halves of requests and wrong bodies, each"
    parser.add_argument("--attack", type=int, default=2, metavar="N", help=text)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the clients' choices")
    add_threads(parser, "as xverse chat")


def run(args: argparse.Namespace) -> dict[str, Any]:
    return measure(**vars(args))


def measure(
    model: str = "nano",
    quantize: str | None = None,
    *,
    minutes: float = 20.0,
    clients: int = 16,
    leaving: float = 0.3,
    attack: int = 2,
    seed: int = 0,
    threads: int | None = None,
) -> dict[str, Any]:
    """Apply load for ``minutes``, then check what the server still holds. Raises UserError for values out of
    range."""
    if minutes <= 0:
        raise UserError(f"--minutes: {minutes:g} is out of range (above 0)")
    if not 0 <= leaving <= 1:
        raise UserError(f"--leaving: {leaving:g} is out of range (0 to 1)")
    resolve(model)
    tally = Tally()
    samples: list[tuple[float, int, float]] = []  # seconds, bytes, blocks held by requests
    with serving(model, quantize, threads, ["--max-cache-tokens", str(_CACHE)]) as (port, process):
        begin = time.monotonic()
        end = begin + 60 * minutes
        notice(f"soak {model}: {clients} clients for {minutes:g} minutes")
        chances = (random.Random(seed * 1000 + n) for n in range(1000))
        tasks: list[tuple[Any, ...]] = [
            (_client, port, next(chances), leaving, end, tally) for _ in range(clients)
        ]
        tasks += [(_watch, port, end, tally)] * _WATCHERS
        for kind in (_hostile, _half, _wrong):
            tasks += [(kind, port, next(chances), end, tally) for _ in range(attack)]
        workers = [threading.Thread(target=call, args=options) for call, *options in tasks]
        for worker in workers:
            worker.start()
        while time.monotonic() < end:
            time.sleep(min(_EVERY, max(end - time.monotonic(), 0.01)))
            figures = _figures(port)
            samples.append(
                (time.monotonic() - begin, process_memory("VmRSS", process.pid) or 0, _held(figures))
            )
        for worker in workers:
            worker.join()
        for _ in range(100):  # the last disconnects are noticed at the end of a step
            figures = _figures(port)
            if not figures["num_requests_running"] and not figures["num_requests_waiting"]:
                break
            time.sleep(0.1)
        alive = process.poll() is None
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code = process.wait(700)
        ending = time.monotonic() - begin
    warm = [size for at, size, _ in samples if at >= _WARM * 60 * minutes]
    middle = statistics.median(warm)
    drift = max(max(warm) / middle - 1, 1 - min(warm) / middle)
    times = [at / 3600 for at, *_ in samples if at >= _WARM * 60 * minutes]
    slope = statistics.linear_regression(times, warm).slope if len(warm) > 1 else 0.0
    gaps = sorted(tally.gaps) or [0.0]
    result = {
        "bench": "soak",
        "model": model,
        "quantize": quantize,
        "minutes": minutes,
        "clients": clients,
        "leaving": leaving,
        "answered": dict(sorted(tally.answered.items())),
        "left": dict(sorted(tally.left.items())),
        "refused": dict(sorted(tally.refused.items())),
        "failed": tally.failed,
        "attackers": attack,
        "server_errors": {str(status): count for status, count in tally.server_errors.items()},
        "gap_p50": round(gaps[len(gaps) // 2], 4),
        "gap_p99": round(gaps[int(0.99 * (len(gaps) - 1))], 4),
        "gap_max": round(gaps[-1], 4),
        "gaps": len(tally.gaps),
        "seconds_to_end": round(ending, 2),
        "exit_code": code,
        "memory_gb": in_gb(middle),
        "memory_slope_mb_per_hour": round(slope / 1e6, 2),
        "memory_drift": round(drift, 4),
        "memory_series_gb": [in_gb(size) for _, size, _ in samples],
        "blocks_held_under_load": round(statistics.median(held for *_, held in samples), 1),
        "blocks_held_after": _held(figures),
        "engine_failures": figures["engine_failures_total"],
        "alive": alive,
    }
    show(f"soak {model}: {clients} clients, {minutes:g} minutes", _rows(result))
    return result


def _rows(result: dict[str, Any]) -> Iterator[Row]:
    yield Row("answered", str(sum(result["answered"].values())))
    yield Row("hung up on", str(sum(result["left"].values())))
    yield Row("invalid requests refused", str(sum(result["refused"].values())))
    failed = len(result["failed"])
    yield Row("failed", str(failed), at_most(0, failed, "requests"))
    errors = sum(result["server_errors"].values())
    yield Row("answers with 5xx", str(errors), at_most(0, errors, "answers"))
    text = f"{result['gap_p50']} s, p99 {result['gap_p99']} s, longest {result['gap_max']} s"
    yield Row("gaps in other streams", text, at_most(GAP_TARGET, result["gap_p99"], "s at p99"))
    yield Row("end after SIGTERM", f"{result['seconds_to_end']} s, exit code {result['exit_code']}")
    yield Row("memory, slope", f"{result['memory_slope_mb_per_hour']} MB per hour")
    drift = result["memory_drift"]
    text = f"{result['memory_gb']:.3f} GB ± {drift:.1%}"
    yield Row("memory, after the first quarter", text, at_most(FLAT_TARGET, drift, "of the median"))
    held = result["blocks_held_after"]
    text = f"{held:g}, {result['blocks_held_under_load']:g} under load"
    yield Row("blocks not returned", text, at_most(0, held, "blocks"))


def _figures(port: int) -> dict[str, float]:
    """The server's metrics of its one model, without their prefixes and labels."""
    figures = {}
    for line in get(port, "/metrics")[1].splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith(("xverse_", "vllm:")) and "," not in name:
            figures[name.partition("{")[0].removeprefix("xverse_").removeprefix("vllm:")] = float(value)
    return figures


def _held(figures: dict[str, float]) -> float:
    free = figures["cache_free_blocks"] + figures["cache_prefix_blocks"]
    return figures["cache_blocks"] - free


def _client(port: int, chance: random.Random, leaving: float, end: float, tally: Tally) -> None:
    while time.monotonic() < end:
        kind = chance.choice(list(_KINDS))
        body = _KINDS[kind](chance)
        leaves = kind != "wrong" and chance.random() < leaving
        connection = None
        try:
            connection, answer = _begun(port, body, chance, leaves)
            if answer is None:
                tally.left[kind] += 1
            elif kind == "wrong" and answer.status == 400:
                answer.read()
                tally.refused[kind] += 1
            elif answer.status != 200:
                if answer.status >= 500:
                    tally.server_errors[answer.status] += 1
                tally.failed.append(f"{kind}: {answer.status} {answer.read().decode()[:200]}")
            elif leaves:
                for _ in range(chance.randint(0, 20)):
                    answer.readline()
                tally.left[kind] += 1
            else:
                data = answer.read().decode()
                if '"error"' in data:
                    tally.failed.append(f"{kind}: {data[-300:]}")
                tally.answered[kind] += 1
        except (OSError, http.client.HTTPException) as error:
            tally.failed.append(f"{kind}: {type(error).__name__}: {error}")
        finally:
            if connection is not None:
                connection.close()


def _watch(port: int, end: float, tally: Tally) -> None:
    """Read streams and record the time between their pieces."""
    while time.monotonic() < end:
        body = {"messages": attackers.QUESTION, "stream": True, "max_tokens": 200, "logit_bias": {"3": -100}}
        connection = None
        try:
            connection, answer = post(port, body)
            last = 0.0
            for line in answer:
                if line.startswith(b"data: {"):
                    now = time.monotonic()
                    if last:
                        tally.gaps.append(now - last)
                    last = now
        except (OSError, http.client.HTTPException) as error:
            tally.failed.append(f"watcher: {type(error).__name__}: {error}")
        finally:
            if connection is not None:
                connection.close()


def _hostile(port: int, chance: random.Random, end: float, tally: Tally) -> None:
    while time.monotonic() < end:
        status = attackers.ask_hostile(port, chance)
        if status is None:
            tally.left["hostile schema"] += 1
        else:
            _count(tally, "hostile schema", status)


def _half(port: int, chance: random.Random, end: float, tally: Tally) -> None:
    while time.monotonic() < end:
        attackers.send_half(port, chance, end)
        tally.left["half a request"] += 1


def _wrong(port: int, chance: random.Random, end: float, tally: Tally) -> None:
    while time.monotonic() < end:
        _count(tally, "wrong body", attackers.send_wrong(port, chance))
        time.sleep(chance.random())


def _count(tally: Tally, kind: str, status: int) -> None:
    if status >= 500:
        tally.server_errors[status] += 1
    elif status == 200:
        tally.answered[kind] += 1
    else:
        tally.refused[kind] += 1


def _begun(port: int, body: dict[str, Any], chance: random.Random, leaves: bool) -> tuple[Any, Any]:
    """The connection and its response; None if the client hangs up before there is one."""
    if leaves and not body.get("stream"):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        time.sleep(chance.random() * 0.2)  # in prefill, or in decode
        return connection, None
    return post(port, body)


def _text(chance: random.Random, low: int, high: int) -> str:
    return " ".join(chance.choices(_WORDS, k=chance.randint(low, high)))


def _chat(chance: random.Random, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": _text(chance, 1, 60)}]
    if chance.random() < 0.3:
        messages.insert(0, {"role": "system", "content": "You are a helpful assistant on a ship. " * 8})
    return {"messages": messages, "max_tokens": chance.randint(1, 120), **more}


_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
_TOOL = {"type": "function", "function": {"name": "look_up", "parameters": _SCHEMA}}
_FORM = {"type": "json_schema", "json_schema": {"schema": _SCHEMA}}
_KINDS: dict[str, Any] = {
    "chat": lambda chance: _chat(chance),
    "stream": lambda chance: _chat(chance, stream=True),
    "several": lambda chance: _chat(chance, n=4, stream=chance.random() < 0.5, logprobs=True),
    "long prompt": lambda chance: {
        "prompt": _text(chance, 300, 1200), "max_tokens": chance.randint(1, 40), "stream": True
    },
    "echo": lambda chance: {"prompt": _text(chance, 1, 100), "max_tokens": 0, "echo": True, "logprobs": 3},
    "schema": lambda chance: _chat(chance, response_format=_FORM, stream=chance.random() < 0.5),
    "tool": lambda chance: _chat(chance, tools=[_TOOL], tool_choice="required"),
    "penalties": lambda chance: _chat(
        chance, presence_penalty=1, frequency_penalty=0.5, seed=chance.randint(0, 99), stop=["\n"]
    ),
    "wrong": lambda chance: _chat(chance, temperature=-1),
}  # fmt: skip
