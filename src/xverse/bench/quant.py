"""``xverse bench quant``: the kernels of matrix products and of attention beside their bounds."""

from __future__ import annotations

import argparse
from typing import Any

from xverse import hardware
from xverse.bench.options import add_rounds, add_shape, add_threads
from xverse.bench.report import count_threads, show, using_threads
from xverse.config import choose
from xverse.model import SHAPES

PARTS = ("matmul", "attention")


def arguments(parser: argparse.ArgumentParser) -> None:
    add_shape(parser, "7b")
    parser.add_argument("--part", choices=PARTS, help="one part (default: both)")
    add_rounds(parser, 5)
    add_threads(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Raises UserError for an unknown shape and for too little memory."""
    from xverse.bench import attention, matmul

    config = choose("shape", args.shape, SHAPES)
    threads = args.threads or hardware.cores().usable
    parts = PARTS if args.part is None else (args.part,)
    result: dict[str, Any] = {
        "bench": "quant",
        "shape": args.shape,
        "threads": threads,
        "rounds": args.rounds,
    }
    title = f"quant {args.shape}, {count_threads(threads)}"
    with using_threads(threads):
        if "matmul" in parts:
            result["matmul"] = matmul.run(config, matmul.KINDS, args.rounds, threads)
            show(f"{title}: products with {result['matmul']['kernels']}", matmul.rows(result["matmul"]))
        if "attention" in parts:
            result["attention"] = attention.run(threads=threads)
            show(f"{title}: attention", attention.rows(result["attention"]))
    return result
