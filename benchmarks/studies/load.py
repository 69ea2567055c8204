"""Memory while loading: peak resident set above the baseline of the process, against the size of the weights.

Generates random bfloat16 weights of a named shape in a temporary directory, loads them in a fresh process,
reads all parameters, and reports VmHWM − baseline for safetensors and for ``.bin``. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.studies.common import (
    ROOT,
    add_directory,
    check_space,
    existing,
    make_weights,
    module,
    need_proc,
)
from xverse.bench.options import add_shape
from xverse.bench.report import Row, at_most, in_gb, need_memory, say_gb, show
from xverse.config import UserError, choose
from xverse.log import notice
from xverse.model import SHAPES

LIMIT = 1.05  # target: peak RSS above the baseline, as a multiple of the weights ...
PROMISED = "7b"  # ... for this shape; with a small model the code itself dominates
FORMATS = ("safetensors", "bin")


def arguments(parser: argparse.ArgumentParser) -> None:
    add_shape(parser, "7b")
    add_directory(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    return measure(args.shape, args.directory)


def measure(shape: str = "7b", directory: str | Path | None = None) -> dict[str, Any]:
    """Measure both formats. ``directory``: for the weights (None: the temporary one).

    Raises UserError for an unknown shape, a missing directory, too little disk space or memory, or a system
    without /proc.
    """
    config = choose("shape", shape, SHAPES)
    need_proc()
    target = existing(directory)
    size = 2 * config.num_parameters()
    need_memory(LIMIT * size)  # with less, pages are evicted and the peak is meaningless
    result: dict[str, Any] = {"bench": "load", "shape": shape, "limit": LIMIT}
    rows = []
    checksums = set()
    for kind in FORMATS:  # in sequence, so that the disk holds the weights once
        check_space(target, size)
        with tempfile.TemporaryDirectory(prefix="xverse-load-", dir=target) as name:
            notice(f"load {shape}: generating {size / 1e9:.2f} GB of {kind} weights in {name}")
            try:
                make_weights(config, Path(name), kind)
            except OSError as error:
                raise UserError(f"{name}: the weights could not be written: {error.strerror}") from error
            figures = _load(Path(name))
        checksums.add(figures.pop("checksum"))
        above = figures["peak_bytes"] - figures["baseline_bytes"]
        figures["ratio"] = round(above / figures["weight_bytes"], 4)
        result[kind] = figures
        limit = f"the target of {LIMIT} × is for {PROMISED}"
        if shape == PROMISED:
            limit = at_most(LIMIT, figures["ratio"], "× the weights")
        rows.append(Row(kind, f"{say_gb(in_gb(above))} = {figures['ratio']:.3f} × the weights", limit))
        seconds = (
            f"{figures['load_s']:.2f} s, {figures['load_and_read_s']:.2f} s including reading every byte"
        )
        rows.append(Row("  time to load", seconds))
    assert len(checksums) == 1, "the two formats gave different weights"
    result["passed"] = all(result[kind]["ratio"] <= LIMIT for kind in FORMATS)
    show(f"load {shape}: peak RSS above the process's baseline", rows)
    return result


def _load(directory: Path) -> dict[str, Any]:
    command = module("workers.load", str(directory))
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout)
