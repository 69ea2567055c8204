"""``xverse bench infer``: prefill and decode speed of a model, or of random weights of a shape."""

from __future__ import annotations

import argparse
from typing import Any

from xverse.bench.options import add_model, add_quantize, add_rounds, add_shape, add_threads, positive
from xverse.device import add_device
from xverse.values import flag


def arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    add_model(source)
    add_shape(source)
    flag(parser, "--prompt-tokens", "prompt length", type=positive, default=512, metavar="N")
    flag(parser, "--new-tokens", "timed decoding steps", type=positive, default=128, metavar="N")
    flag(parser, "--batch", "concurrent requests", type=positive, default=1, metavar="N")
    add_rounds(parser, 3)
    add_threads(parser, "as xverse chat")
    add_quantize(parser, "int3", "int2")
    add_device(parser)
    text = "weights' type (default: as xverse chat)"
    flag(parser, "--dtype", text, choices=["float32", "bfloat16", "float16"])


def run(args: argparse.Namespace) -> dict[str, Any]:
    from xverse.bench.infer_speed import measure_named

    return measure_named(**vars(args))
