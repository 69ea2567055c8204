"""Command-line flags that several benchmarks share. Imports nothing heavy: ``--help`` reads it."""

from __future__ import annotations

import argparse

from xverse.values import whole

positive = whole(1, 10**12)


def add_shape(parser: argparse._ActionsContainer, default: str | None = None) -> None:
    """Without ``default`` together with ``--model``, which it replaces."""
    text = "a named shape" if default else "a named shape with random weights, such as 7b"
    parser.add_argument("--shape", default=default, metavar="S", help=text)


def add_quantize(parser: argparse._ActionsContainer, *low_bits: str) -> None:
    """``low_bits``: ``int3`` and ``int2`` where only speed is measured."""
    parser.add_argument(
        "--quantize", choices=["int8", "int4", *low_bits], help="quantise the weights while loading"
    )


def add_batch(parser: argparse._ActionsContainer, rows: int, length: int) -> None:
    parser.add_argument("--batch-size", type=positive, default=rows, metavar="N", help="sequences per step")
    parser.add_argument("--sequence-length", type=positive, default=length, metavar="N", help="their length")


def add_rounds(parser: argparse._ActionsContainer, default: int) -> None:
    parser.add_argument("--rounds", type=positive, default=default, metavar="N", help="rounds to measure")


def add_threads(parser: argparse._ActionsContainer, default: str = "all usable cores") -> None:
    parser.add_argument("--threads", type=positive, metavar="N", help=f"CPU threads (default: {default})")
