"""The cost of checkpoints: how long they stall a training run, how much they slow it, and resuming."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.studies.common import ROOT, add_directory, batch_of, module
from xverse import hardware
from xverse.bench.options import add_batch, add_shape, add_threads, positive
from xverse.bench.report import Row, at_most, count_threads, need_memory, show
from xverse.config import UserError
from xverse.log import notice
from xverse.model import XverseConfig, XverseForCausalLM, init_weights, named_shape
from xverse.train.checkpoint import kept
from xverse.train.loop import TrainConfig, fit
from xverse.train.memory import predicted_memory
from xverse.train.plot import read_metrics
from xverse.train.report import figures

STALL_TARGET = 0.05  # of the time of the steps, with a checkpoint every 100


def arguments(parser: argparse.ArgumentParser) -> None:
    add_shape(parser, "mini")
    add_batch(parser, 8, 512)
    parser.add_argument("--steps", type=positive, default=120, metavar="N", help="steps of each run")
    parser.add_argument("--every", type=positive, default=100, metavar="N", help="steps between checkpoints")
    add_threads(parser)
    add_directory(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    return measure(**vars(args))


def measure(
    shape: str = "mini",
    *,
    batch_size: int = 8,
    sequence_length: int = 512,
    steps: int = 120,
    every: int = 100,
    threads: int | None = None,
    directory: str | None = None,
) -> dict[str, Any]:
    """Two runs, without and with checkpoints. Raises UserError if ``every`` leaves no step to resume."""
    config = named_shape(shape)
    if not every < steps:
        raise UserError(f"--every: {every} must be below --steps {steps}")
    threads = threads or hardware.cores().usable
    job = {
        "shape": config.to_json(), "steps": steps, "batch_size": batch_size, "length": sequence_length,
        "threads": threads,
    }  # fmt: skip
    settings = TrainConfig(steps=steps, batch_size=batch_size, learning_rate=1e-4)
    need_memory(2 * sum(predicted_memory(config, settings, sequence_length).values()))
    with tempfile.TemporaryDirectory(dir=directory) as folder, hardware.using_threads(threads):
        without, beside = Path(folder) / "without", Path(folder) / "with"
        notice(f"checkpoint {shape}: {steps} steps without checkpoints")
        _train(job, without, 0)
        notice(f"checkpoint {shape}: {steps} steps with a checkpoint every {every}")
        _train(job, beside, every)
        last = kept(beside).all()[-1]
        size = sum(file.stat().st_size for file in last.iterdir())
        totals = [figures(_before_the_end(out, steps)) for out in (without, beside)]
        medians = [
            statistics.median(r["seconds"] for r in read_metrics(out / "metrics.jsonl") if "loss" in r)
            for out in (without, beside)
        ]
        shutil.rmtree(last)  # the final one, so that the run resumes from the one before
        notice(f"checkpoint {shape}: resuming in a fresh process")
        resumed = _resumed({**job, "every": every}, beside)
    count = totals[1]["checkpoints"]
    cost = (totals[1]["stall_seconds"] + totals[1]["beside_seconds"]) / count
    result = {
        "bench": "checkpoint",
        "model": shape,
        "threads": threads,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "steps": steps,
        "every": every,
        "checkpoint_bytes": size,
        "step_seconds": {"without": round(medians[0], 4), "with": round(medians[1], 4)},
        "stall_seconds": round(totals[1]["stall_seconds"] / count, 4),
        "beside_seconds": round(totals[1]["beside_seconds"] / count, 4),
        "stall_share": round(cost / (every * medians[0]), 4),
        "wall_seconds": {"without": round(totals[0]["wall"], 3), "with": round(totals[1]["wall"], 3)},
        "resume": resumed,
    }
    title = f"checkpoint {shape}: batch {batch_size} × {sequence_length}, {count_threads(threads)}"
    show(title, _rows(result))
    return result


def _rows(result: dict[str, Any]) -> Iterator[Row]:
    text = f"{result['stall_seconds']:.3f} s, {result['checkpoint_bytes'] / 1e9:.3f} GB"
    yield Row("stall of the loop by a checkpoint", text)
    yield Row("slowdown of the steps during writing", f"{result['beside_seconds']:.3f} s")
    step = result["step_seconds"]["without"]
    text = f"{result['stall_share']:.2%} of {result['every']} steps of {step:.3f} s"
    yield Row("both together", text, at_most(STALL_TARGET, result["stall_share"], "of the steps' time"))
    wall = result["wall_seconds"]
    yield Row("whole runs, without and with", f"{wall['without']:.1f} s and {wall['with']:.1f} s")
    resume = result["resume"]
    yield Row("resuming: verifying and reading", f"{resume['reading']:.2f} s")
    yield Row("  from process start to the first step", f"{resume['to_first_step']:.2f} s")


def _before_the_end(out: Path, steps: int) -> list[dict[str, Any]]:
    """The records without the final checkpoint, which every run writes."""
    records = read_metrics(out / "metrics.jsonl")
    return [r for r in records if not ("checkpoint" in r and r["step"] == steps - 1)]


def _train(job: dict[str, Any], out: Path, every: int) -> None:
    config = XverseConfig.from_json(job["shape"])
    model = XverseForCausalLM(config)
    init_weights(model, 0)
    settings = TrainConfig(
        steps=job["steps"], batch_size=job["batch_size"], learning_rate=1e-4, checkpoint_every=every,
        preflight="off",
    )  # fmt: skip
    fit(model, lambda first, stop: batch_of(config, job["length"], first, stop), settings, out)


def _resumed(job: dict[str, Any], out: Path) -> dict[str, float]:
    """Seconds to read the checkpoint, and from process start to the end of the first step."""
    before = len((out / "metrics.jsonl").read_text().splitlines())
    start = time.time()
    process = subprocess.Popen(module("checkpoint", json.dumps({**job, "out": str(out)})), cwd=ROOT)
    reading = None
    try:
        while True:
            lines = (out / "metrics.jsonl").read_text().split("\n")[before:-1]  # complete ones
            for record in map(json.loads, lines):
                reading = record.get("resume_seconds", reading)
                if "loss" in record and reading is not None:
                    return {"reading": reading, "to_first_step": round(record["time"] - start, 3)}
            if process.poll() is not None:
                raise UserError(f"resuming ended with exit code {process.returncode}")
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()


def child(text: str) -> None:
    """Resume the run that the JSON ``text`` describes; runs in a fresh process."""
    job = json.loads(text)
    with hardware.using_threads(job["threads"]):
        _train(job, Path(job["out"]), job["every"])


if __name__ == "__main__":
    child(sys.argv[1])
