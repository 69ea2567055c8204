"""Helpers of several studies: random weights on disk, random batches, child processes."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from xverse import hardware
from xverse.config import UserError
from xverse.data.feed import Batch
from xverse.formats.weights import SafetensorsWriter
from xverse.model import IGNORE, XverseConfig, XverseForCausalLM

ROOT = Path(__file__).resolve().parents[2]  # of the checkout; ``python -m benchmarks`` runs there
SHARD_BYTES = 2 * 10**9


def add_directory(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--directory", metavar="DIR", help="where temporary files go (default: $TMPDIR)")


def module(name: str, *arguments: str) -> list[str]:
    """The command for ``benchmarks/studies/{name}.py`` in a fresh process, to be run in ROOT."""
    return [sys.executable, "-m", f"benchmarks.studies.{name}", *arguments]


def run_xverse(arguments: Sequence[str], *, threads: int = 0, capture: bool = False) -> dict[str, Any]:
    """``xverse ARGUMENTS`` in a fresh process: ``seconds``, ``peak_bytes`` and, with ``capture``, ``stderr``.

    ``threads``: PyTorch's (0: its default). Raises UserError where the command fails.
    """
    with tempfile.TemporaryDirectory(prefix="xverse-study-") as folder:
        report = Path(folder) / "report.json"
        done = subprocess.run(
            module("workers.command", str(report), str(threads), *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if capture else None,
            text=True,
            cwd=ROOT,
        )
        figures = json.loads(report.read_text()) if report.exists() else {"code": done.returncode}
    if done.returncode or figures.pop("code"):
        reason = ((done.stderr or "").strip().splitlines() or ["its message is above"])[-1]
        raise UserError(f"xverse {' '.join(arguments)} failed: {reason}")
    return {**figures, "stderr": done.stderr}


def run_finetune(settings: Mapping[str, object], threads: int) -> dict[str, Any]:
    """``xverse finetune`` with ``settings`` as flags: ``peak_bytes`` of its process and its ``metrics``."""
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    figures = run_xverse(["finetune", *flags], threads=threads)
    metrics = json.loads((Path(str(settings["output_dir"])) / "all_results.json").read_text())
    return {"peak_bytes": figures["peak_bytes"], "metrics": metrics}


def need_proc() -> None:
    """Raises UserError on a system without /proc."""
    if hardware.process_memory("VmHWM") is None:
        raise UserError("this study reads /proc/self/status, which only Linux has")


def existing(directory: str | Path | None) -> Path:
    """``directory`` or the temporary one. Raises UserError if it does not exist."""
    path = Path(directory or tempfile.gettempdir()).expanduser().resolve()
    if not path.is_dir():
        raise UserError(f"{path}: no such directory")
    return path


def check_space(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < size * 1.02:
        raise UserError(
            f"needs {size * 1.02 / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free in {directory}; "
            "choose another place with --directory"
        )


def make_weights(config: XverseConfig, directory: Path, kind: str) -> None:
    """Write a model directory without tokenizer: random bfloat16 weights, sharded as upstream's; ``bin``
    files have upstream's ``inv_freq`` buffers. Needs the memory of one tensor, or of one ``.bin`` shard.
    """
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in XverseForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    block = torch.empty(1 << 20, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)

    def random(name: str, number: int) -> torch.Tensor:
        size = shapes[name].numel()
        rolled = block.roll(number * 7919)  # another start for each tensor; values need only be finite
        return rolled.repeat(-(-size // len(block)))[:size].clone().view(shapes[name])

    (directory / "config.json").write_text(json.dumps(config.to_json()))
    if kind == "safetensors":
        writer = SafetensorsWriter(directory, len(shapes), SHARD_BYTES)
        for number, name in enumerate(shapes):
            writer.add(name, random(name, number))
        writer.close()
        return
    numbers = {name: number for number, name in enumerate(shapes)}
    shards = list(_shards({name: shape.numel() * 2 for name, shape in shapes.items()}))
    weight_map = {}
    for index, names in enumerate(shards, 1):
        file = f"pytorch_model-{index:05d}-of-{len(shards):05d}.bin"
        weight_map.update(dict.fromkeys(names, file))
        state = {name: random(name, numbers[name]) for name in names}
        for name in [name for name in names if name.endswith("self_attn.q_proj.weight")]:
            buffer = name.replace("q_proj.weight", "rotary_emb.inv_freq")
            state[buffer] = torch.ones(config.head_dim // 2)
            weight_map[buffer] = file
        torch.save(state, directory / file)
    index_text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "pytorch_model.bin.index.json").write_text(index_text)


def _shards(sizes: dict[str, int]) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if names and filled + size > SHARD_BYTES:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def batch_of(config: XverseConfig, length: int, first: int, stop: int) -> Batch:
    """Sequences ``first`` to ``stop`` of random tokens; all positions but the last have targets."""
    rows = []
    for row in range(first, stop):
        generator = torch.Generator().manual_seed(row)
        rows.append(torch.randint(4, config.vocab_size, (length,), generator=generator))
    tokens = torch.stack(rows)  # [B, T]
    targets = torch.full_like(tokens, IGNORE)
    targets[:, :-1] = tokens[:, 1:]
    return Batch(tokens, targets, torch.zeros_like(tokens, dtype=torch.int32))
