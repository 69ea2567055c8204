"""Quantisation on this machine: the kernels beside their bounds, memory and time of a quantised model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xverse import hardware
from xverse.bench import attention, footprint, gptq, matmul
from xverse.bench.report import count_threads, show, using_threads
from xverse.config import choose
from xverse.model import SHAPES

PARTS = ("matmul", "attention", "memory", "gptq")


def run(
    shape: str = "7b",
    part: str | None = None,
    rounds: int = 5,
    threads: int | None = None,
    directory: str | Path | None = None,
) -> dict[str, Any]:
    """Measure one of ``PARTS`` or all of them. ``directory`` is where weights are made for "memory".

    Raises UserError for an unknown shape, too little memory or disk space.
    """
    config = choose("shape", shape, SHAPES)
    threads = threads or hardware.cores().usable
    parts = PARTS if part is None else (part,)
    result: dict[str, Any] = {"bench": "quant", "shape": shape, "threads": threads, "rounds": rounds}
    if "memory" in parts:  # first: its children want the machine's memory for themselves
        place = Path(directory).expanduser() if directory else None
        result["memory"] = footprint.run(config, place, threads)
        show(f"quant {shape}: memory and time", footprint.rows(result["memory"], shape))
    with using_threads(threads):
        title = f"quant {shape}, {count_threads(threads)}"
        if "matmul" in parts:
            result["matmul"] = matmul.run(config, matmul.KINDS, rounds, threads)
            show(f"{title}: products with {result['matmul']['kernels']}", matmul.rows(result["matmul"]))
        if "attention" in parts:
            result["attention"] = attention.run(threads=threads)
            show(f"{title}: attention", attention.rows(result["attention"]))
        if "gptq" in parts:
            result["gptq"] = gptq.run(config)
            show(f"{title}: GPTQ", gptq.rows(result["gptq"]))
    return result
