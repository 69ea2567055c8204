"""The server under load from another process, beside the engine alone on the same prompts."""

from __future__ import annotations

import http.client
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xverse.bench.report import Row, at_least, at_most, show
from xverse.config import UserError
from xverse.engine import Engine, Request, Sampling
from xverse.engine.load import load_engine
from xverse.formats import load_tokenizer, resolve
from xverse.log import notice

OFFLINE_TARGET = 0.9  # of the engine's own rate
SLOWEST_TARGET = 1 / 3  # of the median stream's rate
REPEAT_TARGET = 0.15  # of the first time to the first token, with a prompt that is known
IDLE_TARGET = 0.01  # of a core
GRAMMAR_TARGET = 0.70  # of the rate without one; the embedded model's
_SHARED, _COMMAND = 1000, "import sys; from xverse.cli import main; sys.exit(main(sys.argv[1:]))"
_SCHEMA = {
    "type": "object",
    "properties": {"names": {"type": "array", "items": {"type": "string"}, "minItems": 10**6}},
    "required": ["names"],
}


def run(
    model: str = "nano",
    quantize: str | None = None,
    *,
    clients: int = 8,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    threads: int | None = None,
) -> dict[str, Any]:
    """Measure ``xverse serve`` with so many streaming clients. Raises UserError for an unknown model."""
    path = resolve(model)
    tokenizer = load_tokenizer(path)
    generator = torch.Generator().manual_seed(0)
    vocabulary = tokenizer.vocab_size

    def prompts(count: int, length: int) -> list[list[int]]:
        return torch.randint(300, vocabulary, (count, length), generator=generator).tolist()

    asked = prompts(clients, prompt_tokens)
    notice(f"serve {model}: the engine alone, {clients} sequences")
    offline = _offline(model, quantize, threads, asked, new_tokens)
    with _server(model, quantize, threads) as (port, process):
        notice(f"serve {model}: {clients} clients")
        _load(port, asked[:1], 4)  # every weight touched once
        streams = _load(port, prompts(clients, prompt_tokens), new_tokens)
        (long,) = prompts(1, _SHARED)
        known = []
        for end in prompts(4, 8):
            (stream,) = _load(port, [long + end], 2)
            known.append(stream.first)
        (plain,) = _load(port, prompts(1, prompt_tokens), new_tokens)
        form = {"response_format": {"type": "json_schema", "json_schema": {"schema": _SCHEMA}}}
        (formed,) = _load(port, [[]], new_tokens, form)
        idle = _cpu_share(process.pid, 5.0)
    begin = min(stream.begun + stream.first for stream in streams)
    last = max(stream.ended for stream in streams)
    rates = [stream.rate for stream in streams]
    result: dict[str, Any] = {
        "bench": "serve",
        "model": model,
        "quantize": quantize,
        "clients": clients,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "offline_tok_s": round(offline, 2),
        "total_tok_s": round(sum(stream.tokens - 1 for stream in streams) / (last - begin), 2),
        "slowest_of_median": round(min(rates) / statistics.median(rates), 3),
        "errors": sum(stream.error is not None for stream in streams),
        "first_token_s": round(statistics.median(stream.first for stream in streams), 4),
        "first_token_shared_s": [round(each, 4) for each in known],
        "repeat_share": round(statistics.median(known[1:]) / known[0], 4),
        "structured_share": round(formed.rate / plain.rate, 3),
        "idle_cpu_share": round(idle, 4),
    }
    show(f"serve {model}: {clients} streaming clients", _rows(result))
    return result


def _rows(result: dict[str, Any]) -> Iterator[Row]:
    share = result["total_tok_s"] / result["offline_tok_s"]
    bound = f"{share:.2f} × the engine alone ({result['offline_tok_s']:.1f} tok/s)"
    if result["model"] != "nano":  # whose steps are so short that sending their tokens takes as long
        bound += "; " + at_least(OFFLINE_TARGET, round(share, 3), "×")
    yield Row("decoded by all streams together", f"{result['total_tok_s']:.1f} tok/s", bound)
    slowest = result["slowest_of_median"]
    yield Row("slowest stream", f"{slowest:.2f} of the median", at_least(1 / 3, slowest, "of the median"))
    yield Row("errors", str(result["errors"]), at_most(0, result["errors"], "errors"))
    yield Row("time to the first token", f"{result['first_token_s']:.3f} s, median")
    first, *others = result["first_token_shared_s"]
    text = f"{first:.3f} s, then {statistics.median(others):.3f} s"
    bound = at_most(REPEAT_TARGET, result["repeat_share"], "of the first")
    yield Row(f"behind {_SHARED} shared tokens", text, bound)
    structured = result["structured_share"]
    yield Row("with a JSON schema", f"{structured:.0%} of the rate", at_least(GRAMMAR_TARGET, structured, ""))
    yield Row(
        "idle",
        f"{result['idle_cpu_share']:.2%} of a core",
        at_most(IDLE_TARGET, result["idle_cpu_share"], ""),
    )


def _offline(
    model: str, quantize: str | None, threads: int | None, prompts: list[list[int]], new_tokens: int
) -> float:
    """Tokens per second that the engine decodes of these prompts together, without a server."""
    before = torch.get_num_threads()
    engine: Engine = load_engine(
        model, quantize=quantize, threads=threads, prefix_cache_bytes=0, max_batch=len(prompts)
    ).engine
    greedy = Sampling(temperature=0)
    try:
        for _ in range(2):  # the first one touches every weight
            handles = {
                engine.submit(
                    Request(prompt_ids=ids, max_new_tokens=new_tokens, sampling=greedy, stop_ids=())
                )
                for ids in prompts
            }
            while handles:
                handles -= {event.handle for event in engine.step()}
            begin, tokens = time.perf_counter(), 0
            while engine.busy:
                tokens += len(engine.step())
            seconds = time.perf_counter() - begin
    finally:
        torch.set_num_threads(before)
    return tokens / seconds


@contextmanager
def _server(
    model: str, quantize: str | None, threads: int | None
) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    flags = ["serve", "--model", model, "--port", "0", "--no-access-log"]
    flags += ["--quantize", quantize] if quantize else []
    flags += ["--threads", str(threads)] if threads else []
    environment = {name: value for name, value in os.environ.items() if name != "XVERSE_API_KEY"}
    process = subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *flags], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise UserError(f"xverse serve ended with {process.wait()}")
        yield int(line.rsplit(":", 1)[1]), process
    finally:
        process.terminate()
        process.wait(30)


@dataclass
class Stream:
    """What one client saw; seconds."""

    begun: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    tokens: int = 0
    error: str | None = None
    lines: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return (self.tokens - 1) / max(self.ended - self.begun - self.first, 1e-9)


def _load(
    port: int, prompts: list[list[int]], new_tokens: int, form: dict[str, Any] | None = None
) -> list[Stream]:
    """One client for each prompt, all at once, each to its last token."""
    streams = [Stream() for _ in prompts]
    threads = [
        threading.Thread(target=_ask, args=(port, prompt, new_tokens, form, stream))
        for prompt, stream in zip(prompts, streams, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = next((stream.error for stream in streams if stream.error), None)
    if failed and len(prompts) == 1:
        raise UserError(f"the server failed: {failed}")
    return streams


def _ask(port: int, prompt: list[int], new_tokens: int, form: dict[str, Any] | None, stream: Stream) -> None:
    body: dict[str, Any] = {"max_tokens": new_tokens, "stream": True, "temperature": 0}
    body["logit_bias"] = {"3": -100}  # no reply ends early
    body["stream_options"] = {"include_usage": True}
    path = "/v1/completions"
    if form is None:
        body["prompt"] = prompt
    else:
        path = "/v1/chat/completions"
        body |= {"messages": [{"role": "user", "content": "Names?"}], **form}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    stream.begun = time.perf_counter()
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
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
            said = data["choices"][0]
            if not stream.first and (said.get("text") or said.get("delta", {}).get("content")):
                stream.first = now - stream.begun
            stream.ended = now
    except (OSError, http.client.HTTPException, UserError) as error:
        stream.error = str(error) or type(error).__name__
    finally:
        connection.close()


def _cpu_share(pid: int, seconds: float) -> float:
    """Of one core, while nothing is asked."""

    def used() -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    time.sleep(1)
    before = used()
    time.sleep(seconds)
    return (used() - before) / seconds
