"""``xverse bench [NAME]``: measure speed and memory on this machine; the last line of stdout is JSON."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

from xverse.cli import Parser
from xverse.config import UserError

# Each is a module of xverse.bench with arguments(parser) and run(args) -> figures.
BENCHMARKS = {
    "infer": "prefill and decode speed compared with the measured memory bandwidth",
    "serve": "the server under load, compared with the engine alone",
    "train": "pretraining speed and memory compared with transformers' Trainer",
    "quant": "INT4, INT8 and bfloat16 kernels compared with their bounds",
    "quality": "what quantising costs a model, compared with llama.cpp's types",
}
ALL = ("infer", "train", "quant")  # without a name: those that need no extra


def arguments(parser: Parser) -> None:
    parser.epilog = (
        f"Without a name: {', '.join(ALL)} in turn. The last line of stdout is one JSON object. "
        "In a checkout `python -m benchmarks --help` lists more measurements."
    )
    parser.hint = "; in a checkout, python -m benchmarks has more"
    names = parser.add_subparsers(dest="name", metavar="NAME")
    for name, text in BENCHMARKS.items():
        sub = names.add_parser(name, help=text, description=text, formatter_class=parser.formatter_class)
        importlib.import_module(f"xverse.bench.{name}").arguments(sub)


def run(args: argparse.Namespace) -> int:
    from xverse.bench.report import finish

    options = dict(vars(args))
    name = options.pop("name")
    if name is None:
        finish(run_all({name: _with_defaults(name) for name in ALL}))
    else:
        finish(importlib.import_module(f"xverse.bench.{name}").run(argparse.Namespace(**options)))
    return 0


def _with_defaults(name: str) -> Callable[[], dict[str, Any]]:
    module = importlib.import_module(f"xverse.bench.{name}")
    parser = argparse.ArgumentParser()
    module.arguments(parser)
    return lambda: module.run(parser.parse_args([]))


def run_all(benchmarks: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """Every measurement that this machine has room for; for the others, the reason why they were skipped."""
    results: dict[str, Any] = {}
    for name, measure in benchmarks.items():
        try:
            results[name] = measure()
        except UserError as error:
            results[name] = {"bench": name, "not_measured": str(error)}
            print(f"{name}\n  not measured: {error}")
        print()
    return {"bench": "all", "results": results}
