"""Peak memory of each process under each layout of two, compared with that of a single process.

Every process is a fresh one, and what counts is its peak resident set above what it has before the model is
made (interpreter, torch, process group). The C library gives freed tensors back at once
(``MMAP_THRESHOLD``), so that the peak is that of living tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.studies.common import ROOT, module
from xverse.bench.options import add_batch, add_shape
from xverse.bench.report import Row, in_gb, need_memory, say_gb, show
from xverse.bench.train_worker import random_batch
from xverse.config import UserError
from xverse.hardware import process_memory
from xverse.log import notice
from xverse.model import XverseConfig, XverseForCausalLM, named_shape
from xverse.train.loop import TrainConfig, train_step
from xverse.train.materialise import initial_weights
from xverse.train.optimizer import make_optimizer
from xverse.train.parallel import distribute, world_of
from xverse.train.settings import layout_of

LAYOUTS: dict[str, dict[str, int]] = {
    "one process": {},
    "fsdp 2": {},
    "tensor 2": {"tensor": 2},
    "context 2": {"context": 2},
    "pipeline 2": {"pipeline": 2},
}
STEPS = 2  # the first one allocates the optimizer's moments
MMAP_THRESHOLD = 64 * 1024


def arguments(parser: argparse.ArgumentParser) -> None:
    add_shape(parser, "mini")
    add_batch(parser, 4, 2048)


def run(args: argparse.Namespace) -> dict[str, Any]:
    return compare(**vars(args))


def compare(shape: str = "mini", *, batch_size: int = 4, sequence_length: int = 2048) -> dict[str, Any]:
    """Measure a named shape in float32, one sequence at a time. Raises UserError for a shape that the layouts
    do not divide or that does not fit into memory."""
    config = named_shape(shape)
    need_memory(2 * 20 * config.num_parameters())
    peaks: dict[str, list[int]] = {}
    for name, degrees in LAYOUTS.items():
        processes = 1 if name == "one process" else 2
        train = settings(batch_size, "none" if processes == 1 else "fsdp", degrees)
        layout_of(train, processes, config, sequence_length)
        peaks[name] = measure(config, name, batch_size, sequence_length, processes)
        notice(f"parallel {shape}: {name}: {', '.join(say_gb(peak / 1e9) for peak in peaks[name])}")
    result = {
        "bench": "parallel",
        "model": shape,
        "parameters": config.num_parameters(),
        "dtype": "float32",
        "batch_size": batch_size,
        "micro_batch_size": 1,
        "sequence_length": sequence_length,
        "peak_gb": {name: [in_gb(peak) for peak in some] for name, some in peaks.items()},
    }
    show(f"parallel {shape}: {batch_size} × {sequence_length}, float32, gloo", _rows(peaks))
    return result


def _rows(peaks: dict[str, list[int]]) -> Iterator[Row]:
    alone = peaks["one process"][0]
    for name, some in peaks.items():
        sizes = ", ".join(say_gb(peak / 1e9) for peak in some)
        yield Row(f"{name}: peak of each process", sizes, f"{max(some) / alone:.0%} of one process")


def settings(batch_size: int, parallel: str, degrees: dict[str, int]) -> TrainConfig:
    return TrainConfig(
        steps=1,
        batch_size=batch_size,
        micro_batch_size=1,
        learning_rate=1e-4,
        dtype="float32",
        parallel=parallel,  # type: ignore[arg-type]
        **degrees,  # type: ignore[arg-type]
    )


def measure(config: XverseConfig, name: str, batch_size: int, length: int, processes: int) -> list[int]:
    """Peak bytes of each process above its start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = json.dumps({"config": config.to_json(), "layout": name, "batch_size": batch_size, "length": length})
    environment = {
        **os.environ,
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD),
    }
    started = [
        subprocess.Popen(
            module("parallel", job),
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(processes)
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise UserError(f"{name} failed; its messages are above")
    return [json.loads(text.splitlines()[-1]) for text in outputs]


def child(job: str) -> None:
    """Run steps of training as the JSON ``job`` says and print the peak memory; runs in a fresh process."""
    values = json.loads(job)
    name, length = values["layout"], values["length"]
    parallel = "none" if name == "one process" else "fsdp"
    train = settings(values["batch_size"], parallel, LAYOUTS[name])
    config = XverseConfig.from_json(values["config"])
    with world_of(train.parallel) as world:
        before = process_memory("VmRSS")
        if before is None:
            raise UserError("this study reads /proc/self/status, which only Linux has")
        replica = distribute(XverseForCausalLM.empty(config), train, world, initial_weights(config, seed=0))
        optimizer = make_optimizer(replica.model, train)
        start, stop = replica.rows(train.batch_size)
        batch = random_batch(config, train.batch_size, length)
        for field in ("tokens", "targets", "document_ids"):
            setattr(batch, field, getattr(batch, field)[start:stop])
        for _ in range(STEPS):
            count = train.batch_size * (length - 1)
            train_step(replica, batch, train, count)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        peak = process_memory("VmHWM")
        assert peak is not None
        print(json.dumps(peak - before))


if __name__ == "__main__":
    child(sys.argv[1])
