"""`xverse serve` with eight streaming clients against our engine alone and llama.cpp with eight sequences.

All three run the same random weights and take turns in one run.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers import files
from benchmarks.peers.run import Worker, working
from xverse import hardware
from xverse.bench import serve
from xverse.bench.weights import placeholder_tokenizer
from xverse.config import UserError, choose
from xverse.formats.quantize import quantize_directory
from xverse.log import notice
from xverse.model import SHAPES
from xverse.quant.settings import QuantSettings

CLIENTS, NEW_TOKENS = 8, 64


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", default="7b", help="a named shape")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each side")
    parser.add_argument("--threads", type=int, help="CPU threads of each side (default: all cores)")
    parser.add_argument("--work-dir", help="folder for the weights (default: $TMPDIR); 7b needs 31 GB")


def run(args: argparse.Namespace) -> dict[str, Any]:
    config = choose("shape", args.shape, SHAPES)
    threads = args.threads or hardware.cores().usable
    parent = Path(args.work_dir or tempfile.gettempdir())
    if not parent.is_dir():
        raise UserError(f"{parent}: no such directory")
    files.need_disk(parent, config, ["Q4_0"])
    with tempfile.TemporaryDirectory(prefix="xverse-peers-", dir=parent) as name:
        folder = Path(name)
        source = files.make(config, folder, ["Q4_0"])
        notice("serving: quantising ours")  # once, not at every start
        settings = QuantSettings(bits=4)
        quantize_directory(source, folder / "int4", placeholder_tokenizer(config.vocab_size), settings)
        shutil.rmtree(source)
        with working("llama.cpp", "Q4_0", folder, threads) as worker:
            figures = serve.measure(
                str(folder / "int4"),
                clients=CLIENTS,
                new_tokens=NEW_TOKENS,
                rounds=args.rounds,
                threads=threads,
                peer=lambda prompts, new_tokens: _decode(worker, prompts, new_tokens),
            )
    return {**figures, "model": f"random {args.shape} INT4", "threads": threads, "peer": "llama.cpp Q4_0"}


def _decode(worker: Worker, prompts: list[list[int]], new_tokens: int) -> float:
    worker.ask("start", prompts=prompts)
    seconds = worker.ask("decode", steps=new_tokens - 1)["seconds"]
    worker.ask("stop")
    return len(prompts) * (new_tokens - 1) / seconds
