"""``xverse bench quant``: INT4, INT8 and bfloat16 matrix products of all layers beside their bounds."""

from __future__ import annotations

import argparse
from typing import Any

from xverse import hardware
from xverse.bench.options import add_rounds, add_shape, add_threads
from xverse.bench.report import count_threads, show, using_threads
from xverse.config import choose
from xverse.model import SHAPES


def arguments(parser: argparse.ArgumentParser) -> None:
    add_shape(parser, "7b")
    add_rounds(parser, 5)
    add_threads(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Raises UserError for an unknown shape and for too little memory."""
    from xverse.bench import matmul

    config = choose("shape", args.shape, SHAPES)
    threads = args.threads or hardware.cores().usable
    with using_threads(threads):
        result = matmul.run(config, matmul.KINDS, args.rounds, threads)
    show(f"quant {args.shape}, {count_threads(threads)}: {result['kernels']}", matmul.rows(result))
    return {
        "bench": "quant",
        "shape": args.shape,
        "threads": threads,
        "rounds": args.rounds,
        "matmul": result,
    }
