"""``xverse bench quality``: what quantising costs in quality."""

from __future__ import annotations

import argparse
from typing import Any

from xverse.bench.options import add_model, add_threads, positive


def arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--texts",
        nargs="+",
        default=[],
        metavar="NAME=PATH,…",
        help="text sets: files (.txt, .jsonl, token shards) or folders (default: the package's own text)",
    )
    parser.add_argument(
        "--calibration", metavar="PATH,…", help="calibration text for gptq (default: gptq is left out)"
    )
    parser.add_argument("--tokens", type=positive, default=32768, metavar="N", help="tokens of each text set")
    parser.add_argument(
        "--calibration-tokens", type=positive, default=65536, metavar="N", help="tokens of calibration text"
    )
    parser.add_argument(
        "--group-size", type=positive, default=128, metavar="N", help="weights that share a scale"
    )
    parser.add_argument(
        "--bits", type=int, nargs="+", choices=[4, 8], default=[4, 8], metavar="4|8", help="bits of a weight"
    )
    add_threads(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from xverse.bench.quality_methods import measure

    return measure(**vars(args))
