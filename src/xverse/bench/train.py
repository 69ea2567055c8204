"""``xverse bench train``: pretraining speed and memory compared with transformers' Llama under its Trainer.

Both sides use the same shape, weights, batch, precision (bf16 autocast over float32 parameters) and optimizer
(fused AdamW, clipped gradients); xverse runs the training step of ``train/``. Each side has its own process;
they alternate, so that changes in the machine's speed affect both. The ratio is the median over pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from xverse import hardware
from xverse.bench.options import add_batch, add_shape, add_threads, positive
from xverse.bench.report import Row, at_least, at_most, count_threads, in_gb, need_memory, say_gb, show
from xverse.config import UserError
from xverse.device import add_device, compute_device, guard
from xverse.log import notice
from xverse.model import XverseConfig, named_shape

# For mini, by vocabulary, relative to the Trainer's tokens/s, the matmul rate and the Trainer's peak memory.
TARGETS: dict[int, dict[str, float]] = {
    8192: {"ratio": 1.4, "matmul_share": 0.7},
    100_534: {"ratio": 1.9, "memory_ratio": 0.5},
}
BLOCKS = 4
SIDES = ("xverse", "transformers")


def arguments(parser: argparse.ArgumentParser) -> None:
    add_shape(parser, "mini")
    text = "entries (default: those of the shape; for mini 8,192, then 100,534)"
    parser.add_argument("--vocabulary", type=positive, metavar="V", help=text)
    add_batch(parser, 8, 512)
    parser.add_argument("--steps", type=positive, default=12, metavar="N", help="timed steps of each side")
    add_threads(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Raises UserError for an unknown shape, too few steps or too little memory."""
    options = dict(vars(args))
    shape, vocabulary = options.pop("shape"), options.pop("vocabulary")
    config = named_shape(shape).without_experts("bench train")
    sizes = [vocabulary] if vocabulary else list(TARGETS) if shape == "mini" else [config.vocab_size]
    results = [measure(dataclasses.replace(config, vocab_size=size), shape, **options) for size in sizes]
    return results[0] if len(results) == 1 else {"bench": "train", "results": results}


def measure(
    config: XverseConfig,
    name: str,
    *,
    batch_size: int,
    sequence_length: int,
    steps: int,
    threads: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """At most ``steps`` timed steps of each side, in equal blocks, after a warm-up step."""
    import torch

    if steps < 3:
        raise UserError(f"steps: {steps} are too few for a median of pairs; use at least 3")
    if not 2 <= sequence_length <= config.context_length:
        raise UserError(f"sequence_length: {sequence_length} is out of range (2 to {config.context_length})")
    threads = threads or hardware.cores().usable
    place = compute_device(device)
    need_memory(estimated_memory(config, batch_size, sequence_length), place)
    product = (batch_size * sequence_length, config.hidden_size, config.intermediate_size)
    block = max(1, steps // BLOCKS)
    title = f"train {name}, vocabulary {config.vocab_size:,}"
    with hardware.using_threads(threads), guard(place), contextlib.ExitStack() as stack:
        matmul = [hardware.matmul_flops(torch.bfloat16, *product, place)]
        job = {"config": config.to_json(), "batch_size": batch_size, "length": sequence_length}
        job["device"] = str(place)
        sides = {
            side: stack.enter_context(_side({**job, "side": side, "threads": threads})) for side in SIDES
        }
        first_loss = {side: take(1)["loss"] for side, take in sides.items()}
        difference = abs(first_loss["xverse"] - first_loss["transformers"])
        assert difference < 0.05, f"the sides do not train the same model: first losses {first_loss}"
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        memory: dict[str, int | None] = {}
        for number in range(steps // block):
            for side, take in sides.items():
                answer = take(block)
                seconds[side].append(answer["seconds"] / block)
                memory[side] = answer["memory"]
            matmul.append(hardware.matmul_flops(torch.bfloat16, *product, place))
            notice(f"{title}: pair {number + 1} of {steps // block}")
    tokens = batch_size * sequence_length
    ratios = [theirs / ours for ours, theirs in zip(seconds["xverse"], seconds["transformers"], strict=True)]
    flops = config.flops_per_token(sequence_length)
    peak = statistics.median(matmul)
    result: dict[str, Any] = {
        "bench": "train",
        "model": name,
        "vocabulary": config.vocab_size,
        "parameters": config.num_parameters(),
        "dtype": "bfloat16 autocast, float32 parameters",
        "device": str(place),
        "threads": threads,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "steps": steps // block * block,
        "block_steps": block,
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "flops_per_token": flops,
        "matmul": list(product),
        "matmul_tflops": [round(rate / 1e12, 5) for rate in matmul],
        "first_loss": first_loss,
    }
    for side in SIDES:
        speed = tokens / statistics.median(seconds[side])
        result[side] = {
            "tokens_s": round(speed, 2),
            "step_s": [round(step, 4) for step in seconds[side]],
            "tflops": {kind: round(speed * count / 1e12, 8) for kind, count in flops.items()},
            "matmul_share": {kind: round(speed * count / peak, 4) for kind, count in flops.items()},
            "peak_rss_gb": in_gb(memory.get(side)),
        }
    ours, theirs = memory["xverse"], memory["transformers"]
    result["memory_ratio"] = None if ours is None or theirs is None else round(ours / theirs, 4)
    show(f"{title}: batch {batch_size} × {sequence_length}, {count_threads(threads)}", _rows(result, peak))
    return result


def _rows(result: dict[str, Any], peak: float) -> Iterator[Row]:
    targets = TARGETS.get(result["vocabulary"], {}) if result["model"] == "mini" else {}
    pairs = ", ".join(f"{ratio:.2f}" for ratio in result["ratios"])
    target = at_least(targets["ratio"], result["ratio"], "×") if targets else ""
    yield Row("xverse / transformers, tokens/s", f"{result['ratio']:.3f} × (median of {pairs})", target)
    if result["memory_ratio"] is not None:
        bound = targets.get("memory_ratio")
        target = at_most(bound, result["memory_ratio"], "×") if bound else ""
        yield Row("xverse / transformers, peak memory", f"{result['memory_ratio']:.3f} ×", target)
    for side in SIDES:
        figures = result[side]
        yield Row(f"{side}", f"{figures['tokens_s']:,.1f} tokens/s")
        for kind in ("causal", "full"):
            share = f"{figures['matmul_share'][kind]:.0%} of {peak / 1e12:.3f} TFLOP/s measured (bf16 matmul)"
            goal = targets.get("matmul_share") if side == "xverse" and kind == "causal" else None
            if goal:
                share += f"; {at_least(goal, figures['matmul_share'][kind], '')}"
            yield Row(f"  attention counted {kind}", f"{figures['tflops'][kind]:.3f} TFLOP/s", share)
        least = f"parameters, gradients, moments: {16 * result['parameters'] / 1e9:.3f} GB"
        yield Row("  peak memory", say_gb(figures["peak_rss_gb"]), least)


def estimated_memory(config: XverseConfig, batch_size: int, length: int) -> int:
    """Peak bytes of both sides together: float32 parameters, gradients and two moments of each; the peer's
    activations, including attention scores and logits in float32 and bfloat16."""
    layer = 20 * config.hidden_size + 10 * config.intermediate_size + 10 * config.num_attention_heads * length
    activations = config.num_hidden_layers * layer + 16 * config.vocab_size
    return 32 * config.num_parameters() + batch_size * length * activations


@contextlib.contextmanager
def _side(job: dict[str, Any]) -> Iterator[Callable[[int], dict[str, Any]]]:
    """Start the process of one side; yields a function that runs some steps and returns its report."""
    command = [sys.executable, "-m", "xverse.bench.train_worker", json.dumps(job)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None

    def take(steps: int) -> dict[str, Any]:
        print(steps, file=process.stdin, flush=True)
        line = process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise UserError(f"train: the process of {job['side']} ended early; its messages are above")
        return json.loads(line)

    try:
        yield take
        process.stdin.close()
        process.wait(timeout=60)
    finally:
        process.kill()
