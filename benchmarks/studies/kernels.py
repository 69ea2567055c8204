"""The CPU kernels of every instruction set that this machine runs, against each other: the engine on decoder
layers of a shape's width, with random weights."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch

from xverse import hardware
from xverse.bench.infer_speed import measure
from xverse.bench.options import add_quantize, add_rounds, add_shape, add_threads, positive
from xverse.bench.report import Row, count_threads, need_memory, show
from xverse.bench.weights import placeholder_tokenizer, random_model
from xverse.config import UserError
from xverse.kernels.native import NAMES, kernel_name, library
from xverse.model import named_shape

_VOCABULARY = 4096  # a head of the shape's vocabulary would take half of the time of eight layers
_BYTES = 4 * 2**30


def arguments(parser: argparse.ArgumentParser) -> None:
    add_shape(parser, "7b")
    parser.add_argument("--layers", type=positive, default=8, metavar="N", help="decoder layers")
    parser.add_argument("--prompt-tokens", type=positive, default=512, metavar="N", help="prompt length")
    parser.add_argument("--new-tokens", type=positive, default=16, metavar="N", help="timed decoding steps")
    parser.add_argument(
        "--sets", nargs="+", choices=NAMES, metavar="SET", help="instruction sets (default: this machine's)"
    )
    add_rounds(parser, 2)
    add_threads(parser)
    add_quantize(parser, "int3", "int2")


def run(args: argparse.Namespace) -> dict[str, Any]:
    kernels = library()
    if kernels is None:
        raise UserError("xverse was installed without its CPU kernels; reinstall it with a C++ compiler")
    here = [name for name in NAMES if kernels.xv_select(name.encode()) is not None]
    sets = args.sets or here
    if missing := [name for name in sets if name not in here]:
        raise UserError(
            f"--sets: this processor does not have {', '.join(missing)}; it has {', '.join(here)}"
        )
    need_memory(_BYTES)
    threads = args.threads or hardware.cores().usable
    config = dataclasses.replace(
        named_shape(args.shape), num_hidden_layers=args.layers, vocab_size=_VOCABULARY
    )
    model = random_model(config, torch.bfloat16, args.quantize or "int4")
    tokenizer = placeholder_tokenizer(_VOCABULARY)
    sizes = {"prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens}
    results = []
    try:
        for name in sets:
            kernels.xv_select(name.encode())
            figures = measure(model, tokenizer, name, **sizes, threads=threads, rounds=args.rounds)
            results.append({"set": name, **figures})
    finally:
        kernels.xv_select(kernel_name().encode())
    title = f"{args.layers} layers of {args.shape}, {results[0]['weights']}, {count_threads(threads)}"
    show(title, _rows(results))
    return {"bench": "kernels", "layers": args.layers, "shape": args.shape, "sets": results}


def _rows(results: list[dict[str, Any]]) -> list[Row]:
    slowest = results[-1]
    rows = []
    for figure, key in (("prefill", "prefill_tok_s"), ("decode", "decode_tok_s")):
        for result in results:
            ratio = f"{result[key] / slowest[key]:.2f} × {slowest['set']}"
            rows.append(Row(f"{figure}, {result['set']}", f"{result[key]:,.1f} tok/s", ratio))
    return rows
