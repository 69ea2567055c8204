"""A training run under torchrun whose processes are killed at random, compared with an undisturbed run."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.studies.common import ROOT, batch_of
from xverse.bench.options import add_batch, add_shape, positive
from xverse.bench.report import Row, at_most, show
from xverse.config import UserError
from xverse.log import notice
from xverse.model import XverseConfig, XverseForCausalLM, init_weights, named_shape
from xverse.train.loop import TrainConfig, fit
from xverse.train.parallel import world_of
from xverse.train.plot import read_metrics

PATIENCE = 600.0  # seconds without a new step


def arguments(parser: argparse.ArgumentParser) -> None:
    add_shape(parser, "nano")
    parser.add_argument("--kills", type=positive, default=20, metavar="N", help="processes to kill, in turn")
    parser.add_argument("--processes", type=positive, default=2, metavar="N", help="processes of the run")
    parser.add_argument("--every", type=positive, default=5, metavar="N", help="steps between checkpoints")
    parser.add_argument("--apart", type=positive, default=12, metavar="N", help="steps between two kills")
    add_batch(parser, 4, 64)
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the choice of rank and moment"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    return measure(**vars(args))


def measure(
    shape: str = "nano",
    *,
    kills: int = 20,
    processes: int = 2,
    every: int = 5,
    apart: int = 12,
    batch_size: int = 4,
    sequence_length: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """Raises UserError for an unknown shape, and for a batch that the processes do not divide."""
    config = named_shape(shape)
    if batch_size % processes:
        raise UserError(f"--batch-size: {batch_size} does not divide into {processes} processes")
    job = {
        "shape": config.to_json(),
        "steps": (kills + 1) * apart,
        "every": every,
        "batch_size": batch_size,
        "length": sequence_length,
    }
    with tempfile.TemporaryDirectory() as folder:
        quiet, killed = Path(folder) / "quiet", Path(folder) / "killed"
        notice(f"survival {shape}: {job['steps']} undisturbed steps")
        _ended(_started(job, quiet, processes, restarts=0))
        process = _started(job, killed, processes, restarts=kills)
        try:
            events = [_kill(process, killed, number, apart, random.Random(seed * 1000 + number), processes)
                      for number in range(kills)]  # fmt: skip
        except BaseException:
            process.kill()
            raise
        _ended(process)
        same = _losses(quiet) == _losses(killed)
    lost = [event["lost"] for event in events]
    seconds = [event["seconds"] for event in events]
    result = {
        "bench": "survival",
        "model": shape,
        "processes": processes,
        "steps": job["steps"],
        "checkpoint_every": every,
        "kills": events,
        "lost_steps": lost,
        "lost_most": max(lost),
        "seconds_to_next_step": {"median": statistics.median(seconds), "most": max(seconds)},
        "losses_equal": same,
    }
    show(f"survival {shape}: {kills} kills of one of {processes} processes", _rows(result, every))
    return result


def _rows(result: dict[str, Any], every: int) -> Iterator[Row]:
    # A checkpoint that was being written when the process was killed is lost.
    lost = f"{statistics.mean(result['lost_steps']):.1f}, at most {result['lost_most']}"
    yield Row("steps repeated after a kill", lost, at_most(2 * every, result["lost_most"], "steps"))
    seconds = result["seconds_to_next_step"]
    yield Row(
        "from the kill to the next new step", f"{seconds['median']:.1f} s, at most {seconds['most']:.1f} s"
    )
    yield Row(
        "losses of all steps equal those of the undisturbed run", "yes" if result["losses_equal"] else "NO"
    )


def _started(job: dict[str, Any], out: Path, processes: int, restarts: int) -> subprocess.Popen[bytes]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
        *(f"--max-restarts={restarts}", "-m", "benchmarks.studies.survival", json.dumps(job), str(out)),
    ]
    out.mkdir()
    with (out / "log.txt").open("wb") as log:
        return subprocess.Popen(
            command,
            env={"OMP_NUM_THREADS": "1", **os.environ},
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )


def _ended(process: subprocess.Popen[bytes]) -> None:
    if process.wait() != 0:
        raise UserError(f"the training run ended with exit code {process.returncode}")


def _kill(
    process: subprocess.Popen[bytes], out: Path, number: int, apart: int, chance: random.Random, size: int
) -> dict[str, Any]:
    """Kill one process at a random moment; returns the steps and seconds lost."""
    target = number * apart + chance.randrange(2, apart)
    _until(process, lambda: max(_losses(out), default=-1) >= target)
    time.sleep(chance.uniform(0, 0.1))
    rank = chance.randrange(size)
    pid = json.loads((out / "heartbeats" / f"{rank}.json").read_text())["pid"]
    before = len(_lines(out))
    start = time.time()
    os.kill(pid, signal.SIGKILL)
    figures: dict[str, Any] = {}

    def again() -> bool:
        """Whether the run has resumed and completed a step that is new."""
        lines = _lines(out)
        later = [r for r in lines[before:] if "resume_seconds" in r]
        if not later:
            return False
        resumed = later[0]
        at = lines.index(resumed)
        done = max(r["step"] for r in lines[:at] if "loss" in r)
        new = [r for r in lines[at:] if "loss" in r and r["step"] > done]
        figures.update(lost=done - resumed["step"], resumed=resumed["step"] + 1)
        if new:
            figures["seconds"] = round(new[0]["time"] - start, 2)
        return bool(new)

    _until(process, again)
    notice(f"kill {number + 1}: rank {rank}, {figures['lost']} steps repeated, {figures['seconds']:.1f} s")
    return {"rank": rank, **figures}


def _until(process: subprocess.Popen[bytes], ready: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise UserError("the training run did not recover from a kill")
        time.sleep(0.02)


def _lines(out: Path) -> list[dict[str, Any]]:
    """All records in the order of writing, without an incomplete one at the end."""
    file = out / "metrics.jsonl"
    records = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _losses(out: Path) -> dict[int, float]:
    file = out / "metrics.jsonl"
    return {r["step"]: r["loss"] for r in read_metrics(file) if "loss" in r} if file.exists() else {}


def main(job: dict[str, Any], out: Path) -> None:
    """Train as ``job`` says; runs in each process under torchrun."""
    config = XverseConfig.from_json(job["shape"])
    with world_of("fsdp") as world:
        model = XverseForCausalLM(config)
        init_weights(model, 0)
        settings = TrainConfig(
            steps=job["steps"], batch_size=job["batch_size"], learning_rate=1e-3, parallel="fsdp",
            checkpoint_every=job["every"], preflight="off", communication_every=0,
        )  # fmt: skip
        fit(
            model,
            lambda first, stop: batch_of(config, job["length"], first, stop),
            settings,
            out,
            world=world,
        )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
