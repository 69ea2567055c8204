"""Our engine compared with llama.cpp and transformers, on the same random weights, in one run.

Each engine has its own process. They take turns, so that one computes at a time, and the memory's read
bandwidth is sampled before and after every timed piece.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import files
from benchmarks.studies.common import ROOT
from xverse import hardware
from xverse.bench.report import Row, show
from xverse.config import UserError, choose
from xverse.log import notice
from xverse.model import SHAPES

TOKENS = 4096  # in each cache
BATCH, BATCH_CONTEXT = 8, 64


@dataclass(frozen=True)
class Part:
    """Our weights compared with those of peers; each round times all pieces of a part."""

    ours: str
    peers: tuple[tuple[str, str], ...]  # engine, weights
    contexts: tuple[int, ...] = (16, 512)
    batch: bool = False
    steps: int = 24
    together: bool = True  # all engines fit into memory together


PARTS = {
    "int4": Part("int4", (("llama.cpp", "Q4_0"), ("llama.cpp", "Q4_K_M")), batch=True),
    "int8": Part("int8", (("llama.cpp", "Q8_0"),)),
    "bf16": Part("bf16", (("transformers", "bf16"),), steps=8, together=False),
}


class Worker:
    """The process of one engine."""

    def __init__(self, kind: str, weights: str, path: Path, threads: int) -> None:
        self.name = f"{kind} {weights}"
        arguments = [kind, str(path), weights, str(threads), str(TOKENS)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.about = self._answer()

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps({"do": do, **values}), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"{self.name}: its process exited with code {self._process.wait()}")
        figures: dict[str, Any] = json.loads(line)
        return figures


@contextmanager
def working(kind: str, weights: str, path: Path, threads: int) -> Iterator[Worker]:
    notice(f"peers: loading {kind} {weights}")
    worker = Worker(kind, weights, path, threads)
    try:
        yield worker
    finally:
        worker.close()


class Clock:
    """Times requests to workers, and samples the memory's read bandwidth before and after."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._buffer = hardware.bandwidth_buffer()

    def time(self, worker: Worker, do: str, **values: Any) -> dict[str, Any]:
        before = self._bandwidth()
        figures = worker.ask(do, **values)
        figures["device"] = (before + self._bandwidth()) / 2
        return figures

    def _bandwidth(self) -> float:
        return hardware.read_bandwidth(self._buffer, self._threads, seconds=0.15)


def prompts(vocabulary: int, length: int, count: int = 1) -> list[list[int]]:
    generator = np.random.default_rng(length)
    return generator.integers(300, vocabulary, (count, length)).tolist()


def one_round(clock: Clock, worker: Worker, part: Part, vocabulary: int) -> dict[str, dict[str, Any]]:
    figures: dict[str, dict[str, Any]] = {}
    for context in part.contexts:
        started = clock.time(worker, "start", prompts=prompts(vocabulary, context))
        if context == 512:
            figures["prefill 512"] = {**started, "tokens": context, "read": None}
        decoded = clock.time(worker, "decode", steps=part.steps)
        figures[f"decode, context {context}"] = _decoded(worker, decoded, part.steps, 1, context)
        worker.ask("stop")
    if part.batch:
        worker.ask("start", prompts=prompts(vocabulary, BATCH_CONTEXT, BATCH))
        decoded = clock.time(worker, "decode", steps=part.steps)
        figures[f"decode, {BATCH} sequences"] = _decoded(worker, decoded, part.steps, BATCH, BATCH_CONTEXT)
        worker.ask("stop")
    return figures


def _decoded(worker: Worker, figures: dict[str, Any], steps: int, batch: int, context: int) -> dict[str, Any]:
    positions = batch * (context + (steps + 1) / 2)
    read = worker.about["weight_bytes"] + worker.about["position_bytes"] * positions
    return {**figures, "tokens": steps * batch, "read": read * steps}


def measure(
    part: Part, source: Path, folder: Path, threads: int, rounds: int, vocabulary: int
) -> dict[str, Any]:
    """Medians of every piece for all engines of a part."""
    clock = Clock(threads)
    sides = [("xverse", part.ours), *part.peers]

    def place(kind: str) -> Path:
        return folder if kind == "llama.cpp" else source

    collected: dict[str, list[dict[str, dict[str, Any]]]] = {}
    logits: dict[str, Any] = {}
    about: dict[str, Any] = {}

    def visit(worker: Worker, times: int) -> None:
        if worker.name not in collected:
            logits[worker.name] = np.array(worker.ask("logits", prompt=prompts(vocabulary, 32)[0])["logits"])
            about[worker.name] = worker.about
            worker.ask("start", prompts=prompts(vocabulary, 16))
            worker.ask("decode", steps=2)  # touches every weight once
            worker.ask("stop")
        for _ in range(times):
            collected.setdefault(worker.name, []).append(one_round(clock, worker, part, vocabulary))

    if part.together:
        with ExitStack() as stack:
            workers = [
                stack.enter_context(working(kind, weights, place(kind), threads)) for kind, weights in sides
            ]
            for number in range(rounds):
                notice(f"peers: {part.ours}, round {number + 1} of {rounds}")
                for worker in workers:
                    visit(worker, 1)
    else:
        for kind, weights in sides:
            with working(kind, weights, place(kind), threads) as worker:
                notice(f"peers: {worker.name}, {rounds} rounds")
                visit(worker, rounds)
    ours = f"xverse {part.ours}"
    return {
        "engines": {
            name: {**about[name], "same_logits": _cosine(logits[ours], logits[name])} for name in collected
        },
        "pieces": {
            piece: {name: _summary(runs, piece) for name, runs in collected.items()}
            for piece in collected[ours][0]
        },
    }


def _cosine(one: Any, other: Any) -> float:
    one, other = one - one.mean(), other[: len(one)] - other[: len(one)].mean()
    return round(float(one @ other / np.linalg.norm(one) / np.linalg.norm(other)), 5)


def _summary(runs: list[dict[str, dict[str, Any]]], piece: str) -> dict[str, Any]:
    rates = [run[piece]["tokens"] / run[piece]["seconds"] for run in runs]
    device = [run[piece]["device"] for run in runs]
    figures: dict[str, Any] = {
        "tok_s": round(statistics.median(rates), 2),
        "runs_tok_s": [round(rate, 2) for rate in rates],
        "device_read_gb_s": [round(rate / 1e9, 1) for rate in device],
    }
    if runs[0][piece]["read"] is not None:
        read = [run[piece]["read"] / run[piece]["seconds"] for run in runs]
        figures["read_gb_s"] = round(statistics.median(read) / 1e9, 2)
        shares = [rate / bound for rate, bound in zip(read, device, strict=True)]
        figures["read_share"] = round(statistics.median(shares), 3)
        figures["rss_gb"] = round(max(run[piece]["resident"] for run in runs) / 1e9, 2)
    return figures


def rows(name: str, result: dict[str, Any]) -> Iterator[Row]:
    ours = f"xverse {PARTS[name].ours}"
    for piece, engines in result["pieces"].items():
        own = engines[ours]
        for engine, figures in engines.items():
            text = f"{figures['tok_s']:.2f} tok/s"
            if "read_share" in figures:
                text += f", {figures['read_gb_s']:.1f} GB/s = {figures['read_share']:.0%} of the sampled rate"
            ratios = [
                one / other for one, other in zip(own["runs_tok_s"], figures["runs_tok_s"], strict=True)
            ]
            bound = "" if engine == ours else f"ours is {statistics.median(ratios):.2f} × as fast"
            yield Row(f"{piece}: {engine}", text, bound)
    for engine, figures in result["engines"].items():
        if engine != ours:
            yield Row(
                f"logits of {engine}", f"cosine with ours {figures['same_logits']:.4f}", figures["notes"]
            )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", default="7b", help="a named shape")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="some parts (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of every engine")
    parser.add_argument("--threads", type=int, help="CPU threads of every engine (default: all cores)")
    parser.add_argument("--work-dir", help="folder for the weights (default: $TMPDIR); 7b needs 31 GB")


def run(args: argparse.Namespace) -> dict[str, Any]:
    config = choose("shape", args.shape, SHAPES)
    names = args.only or list(PARTS)
    threads = args.threads or hardware.cores().usable
    kinds = [weights for name in names for kind, weights in PARTS[name].peers if kind == "llama.cpp"]
    parent = Path(args.work_dir or tempfile.gettempdir())
    if not parent.is_dir():
        raise UserError(f"{parent}: no such directory")
    files.need_disk(parent, config, kinds)
    result: dict[str, Any] = {
        "bench": "peers",
        "shape": args.shape,
        "threads": threads,
        "rounds": args.rounds,
        "parts": {},
    }
    with tempfile.TemporaryDirectory(prefix="xverse-peers-", dir=parent) as name:
        folder = Path(name)
        source = files.make(config, folder, kinds)
        for part in names:
            figures = measure(PARTS[part], source, folder, threads, args.rounds, config.vocab_size)
            result["parts"][part] = figures
            show(f"{args.shape} {part}, {threads} threads, medians of {args.rounds}", rows(part, figures))
            print(flush=True)
    return result
