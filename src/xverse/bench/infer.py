"""``xverse bench infer``: prefill and decode speed of a model, or of random weights of a shape."""

from __future__ import annotations

import argparse
from typing import Any

from xverse.bench.options import add_quantize, add_rounds, add_shape, add_threads, positive
from xverse.device import add_device
from xverse.values import add_model


def arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    add_model(source)
    add_shape(source)
    parser.add_argument("--prompt-tokens", type=positive, default=512, metavar="N", help="prompt length")
    parser.add_argument("--new-tokens", type=positive, default=128, metavar="N", help="timed decoding steps")
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="concurrent requests")
    add_rounds(parser, 3)
    add_threads(parser, "as xverse chat")
    add_quantize(parser, "int3", "int2")
    add_device(parser)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="weights' type (default: as xverse chat)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from xverse.bench.infer_speed import load_named, measure

    sizes = {name: getattr(args, name) for name in ("prompt_tokens", "new_tokens", "batch")}
    model, tokenizer = load_named(
        args.model, args.shape, dtype=args.dtype, quantize=args.quantize, device=args.device, **sizes
    )
    name, threads = args.shape or args.model, args.threads
    return measure(model, tokenizer, name, **sizes, threads=threads, rounds=args.rounds)
