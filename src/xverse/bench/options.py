"""Command-line flags that several benchmarks share. Imports nothing heavy: ``--help`` reads it."""

from __future__ import annotations

import argparse

from xverse.values import flag, whole

positive = whole(1, 10**12)


def add_model(parser: argparse._ActionsContainer) -> None:
    flag(parser, "--model", "nano, a model directory or a hub id", default="nano", metavar="M")


def add_shape(parser: argparse._ActionsContainer, default: str | None = None) -> None:
    """Without ``default`` beside ``--model``, which it replaces."""
    text = "a named shape" if default else "a named shape with random weights, such as 7b"
    flag(parser, "--shape", text, default=default, metavar="S")


def add_quantize(parser: argparse._ActionsContainer, *low_bits: str) -> None:
    """``low_bits``: ``int3`` and ``int2`` where only speed is measured."""
    flag(parser, "--quantize", "quantise the weights while loading", choices=["int8", "int4", *low_bits])


def add_batch(parser: argparse._ActionsContainer, rows: int, length: int) -> None:
    flag(parser, "--batch-size", "sequences per step", type=positive, default=rows, metavar="N")
    flag(parser, "--sequence-length", "their length", type=positive, default=length, metavar="N")


def add_rounds(parser: argparse._ActionsContainer, default: int) -> None:
    flag(parser, "--rounds", "rounds to measure", type=positive, default=default, metavar="N")


def add_threads(parser: argparse._ActionsContainer, default: str = "all usable cores") -> None:
    flag(parser, "--threads", f"CPU threads (default: {default})", type=positive, metavar="N")
