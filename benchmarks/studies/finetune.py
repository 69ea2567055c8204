"""Fine-tuning: speed and memory compared with transformers' and trl's trainers, and the memory of QLoRA.

``--part peers``: contenders take turns, each in its own process, over several rounds; figures are medians.
``--part memory``: steps of QLoRA on random weights of a shape.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies.common import (
    ROOT,
    add_directory,
    check_space,
    existing,
    make_weights,
    module,
    run_finetune,
)
from benchmarks.studies.trainers import CONTENDERS
from xverse import hardware
from xverse.bench.options import add_batch, add_rounds, add_threads, positive
from xverse.bench.report import Row, at_least, at_most, count_threads, need_memory, show
from xverse.bench.weights import placeholder_tokenizer
from xverse.config import UserError, choose
from xverse.finetune.settings import read_settings
from xverse.formats.quantize import quantize_directory
from xverse.log import notice
from xverse.model import XverseConfig, XverseForCausalLM, init_weights, named_shape
from xverse.quant.settings import QuantSettings

VOCABULARY = 100_534
# ours, the peer, minimum ratio of tokens/s, maximum ratio of memory
TARGETS = (("xverse", "transformers", 1.3, 0.6), ("xverse-packed", "trl", 1.1, 0.95))
QLORA_GB = 10.0


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--part",
        choices=["peers", "memory"],
        default="peers",
        help="peers: speed compared with other trainers; memory: QLoRA on random INT4 weights",
    )
    parser.add_argument("--data", metavar="FILE", help="a file of instructions such as alpaca's (peers)")
    parser.add_argument("--shape", metavar="S", help="a named shape (default: mini for peers, 7b for memory)")
    parser.add_argument(
        "--vocabulary", type=positive, default=VOCABULARY, metavar="V", help="entries of the model (peers)"
    )
    add_batch(parser, 8, 512)
    parser.add_argument("--steps", type=positive, default=6, metavar="N", help="steps of each training")
    add_rounds(parser, 3)
    parser.add_argument(
        "--contenders", nargs="+", metavar="NAME", help=f"some of {', '.join(CONTENDERS)} (default: all)"
    )
    add_threads(parser)
    add_directory(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    threads = args.threads or hardware.cores().usable
    if args.part == "memory":
        name = args.shape or "7b"
        return measure_memory(name, args.sequence_length, args.steps, threads, existing(args.directory))
    if args.data is None:
        raise UserError("name a file of instructions with --data, such as alpaca's")
    return compare(
        Path(args.data).expanduser(),
        args.shape or "mini",
        vocabulary=args.vocabulary,
        batch_size=args.batch_size,
        sequence_length=args.sequence_length,
        steps=args.steps,
        rounds=args.rounds,
        sides=args.contenders or CONTENDERS,
        threads=threads,
    )


def compare(
    data: Path,
    shape: str,
    *,
    vocabulary: int,
    batch_size: int,
    sequence_length: int,
    steps: int,
    rounds: int,
    sides: Sequence[str],
    threads: int,
) -> dict[str, Any]:
    """Tokens/s and peak memory of every side. Raises UserError for too few steps or too little memory."""
    if steps < 2:
        raise UserError("steps: use at least 2; the first one warms up")
    for side in sides:
        choose("contenders", side, {name: name for name in CONTENDERS})
    config = dataclasses.replace(named_shape(shape), vocab_size=vocabulary)
    need_memory(16 * config.num_parameters() + 16 * batch_size * sequence_length * config.vocab_size)
    with tempfile.TemporaryDirectory(prefix="xverse-finetune-") as name:
        job = _prepare(Path(name), config, data, sequence_length)
        job |= {"length": sequence_length, "batch_size": batch_size, "steps": steps, "threads": threads}
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for number in range(rounds):
            for side in sides:
                notice(f"finetune: round {number + 1} of {rounds}, {side}")
                runs[side].append(_child({**job, "side": side}))
    result: dict[str, Any] = {
        "bench": "finetune",
        "part": "peers",
        "parameters": config.num_parameters(),
        "vocabulary": config.vocab_size,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "steps": steps,
        "rounds": rounds,
        "threads": threads,
        "contenders": {side: _summary(some) for side, some in runs.items()},
    }
    result["ratios"] = _ratios(runs)
    result["shape"] = shape
    title = f"finetune: {batch_size} × {sequence_length}, V {config.vocab_size:,}, {count_threads(threads)}"
    show(title, _rows(result))
    return result


def _prepare(folder: Path, config: XverseConfig, data: Path, length: int) -> dict[str, Any]:
    """Write equal weights for both kinds of model, and the ids and masks of the examples."""
    from xverse.finetune.encode import load_data
    from xverse.formats import load_tokenizer, resolve, save_hf, save_llama

    tokenizer = load_tokenizer(resolve("nano"))
    model = XverseForCausalLM(config)
    init_weights(model, seed=0)
    save_hf(model, tokenizer, folder / "xverse", torch.float32)
    save_llama(model, tokenizer, folder / "llama", torch.float32)
    values = {"model_name_or_path": "nano", "dataset": str(data), "output_dir": "-", "do_train": True}
    settings = read_settings({**values, "max_samples": 4096}, "benchmarks finetune")
    examples = load_data(settings, tokenizer, length).train
    random.Random(0).shuffle(examples)
    rows = [(example.ids, example.mask, example.name) for example in examples]
    (folder / "examples.json").write_text(json.dumps(rows))
    paths = {name: str(folder / name) for name in ("xverse", "llama", "out")}
    return {**paths, "examples": str(folder / "examples.json")}


def _child(job: dict[str, Any]) -> dict[str, Any]:
    command = module("trainers", json.dumps(job))
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1]
        raise UserError(f"{job['side']} failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _speed(run: dict[str, Any]) -> float:
    """Tokens per second without padding and without the first step."""
    return sum(run["tokens"][1:]) / sum(run["seconds"][1:])


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    peaks = [run["peak_bytes"] for run in runs if run["peak_bytes"]]
    return {
        "tokens_s": round(statistics.median(_speed(run) for run in runs), 2),
        "tokens_s_rounds": [round(_speed(run), 2) for run in runs],
        "tokens_a_step": round(statistics.mean(runs[0]["tokens"][1:]), 1),
        "peak_gb": round(statistics.median(peaks) / 1e9, 4) if peaks else None,
        "first_loss": runs[0]["losses"][0],
        "last_loss": runs[0]["losses"][-1],
    }


def _ratios(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    ratios = []
    for ours, family, speed, memory in TARGETS:
        rivals = [side for side in runs if side.startswith(family)]
        if ours not in runs:
            continue
        for rival in rivals:
            pairs = list(zip(runs[ours], runs[rival], strict=True))
            ratios.append(
                {
                    "ours": ours,
                    "theirs": rival,
                    "speed": round(statistics.median(_speed(a) / _speed(b) for a, b in pairs), 4),
                    "memory": round(
                        statistics.median(a["peak_bytes"] / b["peak_bytes"] for a, b in pairs), 4
                    ),
                    "speed_target": speed,
                    "memory_target": memory,
                }
            )
    return ratios


def _rows(result: dict[str, Any]) -> Iterator[Row]:
    for side, figures in result["contenders"].items():
        speed = f"{figures['tokens_s']:,.1f} tokens/s, {figures['tokens_a_step']:,.0f} per step"
        loss = f"loss {figures['first_loss']:.3f} → {figures['last_loss']:.3f}"
        yield Row(side, f"{speed}; {figures['peak_gb']} GB", loss)
    promised = result["shape"] == "mini" and result["vocabulary"] == VOCABULARY
    for ratio in result["ratios"]:
        name = f"{ratio['ours']} / {ratio['theirs']}"
        yield Row(
            f"{name}, tokens/s",
            f"{ratio['speed']:.2f} ×",
            at_least(ratio["speed_target"], ratio["speed"], "×") if promised else "",
        )
        yield Row(
            f"{name}, memory",
            f"{ratio['memory']:.2f} ×",
            at_most(ratio["memory_target"], ratio["memory"], "×") if promised else "",
        )


def measure_memory(name: str, sequence_length: int, steps: int, threads: int, place: Path) -> dict[str, Any]:
    """Steps of QLoRA with activation checkpointing on random INT4 weights, on full rows of random tokens."""
    config = named_shape(name)
    check_space(place, 3 * config.num_parameters())
    with tempfile.TemporaryDirectory(prefix="xverse-qlora-", dir=place) as folder:
        plain, quantised = Path(folder) / "plain", Path(folder) / "int4"
        plain.mkdir()
        notice(f"finetune: random weights of {name}, and xverse quantize --bits 4")
        make_weights(config, plain, "safetensors")
        tokenizer = placeholder_tokenizer(config.vocab_size)
        tokenizer.save(plain)
        quantize_directory(plain, quantised, tokenizer, QuantSettings(bits=4, embedding_bits=16))
        for file in plain.glob("*.safetensors"):
            file.unlink()
        draw = random.Random(0)
        words = [f" {draw.randrange(10_000):06d}" for _ in range(2 * sequence_length)]
        rows = [
            {"instruction": "".join(words[:8]).strip(), "input": "", "output": "".join(words[8:]).strip()}
        ]
        (Path(folder) / "data.json").write_text(json.dumps(rows * max(2, steps)))
        flags = {
            "model_name_or_path": quantised, "dataset": Path(folder) / "data.json", "do_train": True,
            "finetuning_type": "lora", "bf16": True, "gradient_checkpointing": True, "max_steps": steps,
            "per_device_train_batch_size": 1, "cutoff_len": sequence_length, "logging_steps": 1,
            "save_strategy": "no", "output_dir": Path(folder) / "out",
        }  # fmt: skip
        notice(f"finetune: {steps} steps of QLoRA at {sequence_length} tokens")
        figures = run_finetune(flags, threads)
    result = {
        "bench": "finetune",
        "part": "memory",
        "model": name,
        "tokens": sequence_length,
        "steps": steps,
        "threads": threads,
        **figures,
    }
    peak = figures["peak_bytes"] / 1e9
    title = (
        f"QLoRA of {name} on INT4, {sequence_length} tokens, batch 1, recomputing; {count_threads(threads)}"
    )
    rows_shown = [
        Row(
            "peak memory of the process",
            f"{peak:.2f} GB",
            at_most(QLORA_GB, peak, "GB") if name == "7b" else "",
        ),
        Row("predicted", f"{figures['metrics']['memory_predicted_gb']:.2f} GB"),
        Row("seconds per step", f"{figures['metrics']['train_runtime'] / steps:.1f}"),
    ]
    show(title, rows_shown)
    return result
