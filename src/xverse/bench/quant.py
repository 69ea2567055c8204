"""``xverse bench quant``: matrix products of all layers in bfloat16 and in 8, 4, 3 and 2 bits, against their
bounds."""

from __future__ import annotations

import argparse
from typing import Any

from xverse import hardware
from xverse.bench.options import add_rounds, add_shape, add_threads
from xverse.bench.report import count_threads, show
from xverse.config import choose
from xverse.device import add_device, compute_device, guard
from xverse.model import SHAPES


def arguments(parser: argparse.ArgumentParser) -> None:
    add_shape(parser, "7b")
    add_rounds(parser, 5)
    add_threads(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Raises UserError for an unknown shape and for too little memory."""
    from xverse.bench import matmul

    config = choose("shape", args.shape, SHAPES)
    threads = args.threads or hardware.cores().usable
    device = compute_device(args.device)
    with hardware.using_threads(threads), guard(device):
        # On a GPU 3 and 2 bits are dequantised first.
        kinds = matmul.KINDS if device.type == "cpu" else matmul.KINDS[:3]
        result = matmul.run(config, kinds, args.rounds, threads, device)
    show(f"quant {args.shape}, {count_threads(threads)}: {result['kernels']}", matmul.rows(result))
    return {
        "bench": "quant",
        "shape": args.shape,
        "device": str(device),
        "threads": threads,
        "rounds": args.rounds,
        "matmul": result,
    }
