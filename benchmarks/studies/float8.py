"""Pretraining with the layers' matrices in FP8 against bfloat16: loss curves on the same data, and speed."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from typing import Any

import torch

from xverse.bench.options import add_batch, add_shape, positive
from xverse.bench.report import Row, show
from xverse.data.feed import PretrainFeed
from xverse.data.mixture import MixtureConfig
from xverse.device import compute_device
from xverse.log import notice
from xverse.model import XverseConfig, XverseForCausalLM, named_shape
from xverse.train import TrainConfig
from xverse.train.float8 import check_float8
from xverse.train.loop import train_step
from xverse.train.materialise import initial_weights
from xverse.train.optimizer import learning_rate, make_optimizer
from xverse.train.parallel import World, distribute
from xverse.train.report import peak_of

LAST = 10  # final steps whose mean loss represents the end of a curve


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="DIR", help="a folder made by xverse data prepare")
    add_shape(parser, "mini")
    parser.add_argument("--steps", type=positive, default=300, metavar="N", help="steps of each training")
    add_batch(parser, 32, 2048)
    parser.add_argument(
        "--micro-batch-size", type=int, default=0, metavar="N", help="sequences per forward pass (0: all)"
    )
    parser.add_argument("--compile", action="store_true", help="compile the layers")


def run(args: argparse.Namespace) -> dict[str, Any]:
    return measure(**vars(args))


def measure(
    data: str,
    shape: str = "mini",
    *,
    steps: int = 300,
    batch_size: int = 32,
    sequence_length: int = 2048,
    micro_batch_size: int = 0,
    compile: bool = False,
) -> dict[str, Any]:
    """Train a named shape from the same weights in both types on a prepared folder, on one GPU.

    Raises UserError where there is no GPU with FP8, and for a folder that is not prepared.
    """
    config = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        learning_rate=1e-3,
        warmup_steps=max(1, steps // 20),
        compile=compile,
        float8=True,
    )
    device = compute_device()
    check_float8(config, named_shape(shape), device, sequence_length)
    feed = PretrainFeed(data, MixtureConfig(), sequence_length, seed=0)
    model_config = dataclasses.replace(named_shape(shape), vocab_size=feed.tokenizer.vocab_size)
    result = compare(model_config, config, feed, device)
    rows = []
    for name, figures in result["curves"].items():
        rate = figures["tokens_per_second"]
        peak = peak_of(device, None, name == "float8")
        share = "unknown"
        if peak:
            full = model_config.flops_per_token(sequence_length)["full"]
            share = f"{100 * rate * full / peak.flops:.1f} % {peak.label} (full attention)"
        rows.append(Row(f"{name}, tokens/s", f"{rate:,.0f}", share))
        rows.append(Row(f"{name}, loss at the end, nats", f"{figures['end']:.4f}"))
    rows.append(Row("FP8's loss above bfloat16's, at the end", f"{100 * result['end_above']:+.2f} %"))
    rows.append(Row("largest difference at any step", f"{100 * result['furthest']:.2f} %"))
    show(f"FP8 compared with bfloat16: {shape}, {steps} steps of {batch_size} × {sequence_length}", rows)
    return {"bench": "float8", "shape": shape, "device": torch.cuda.get_device_name(device), **result}


def compare(
    shape: XverseConfig, config: TrainConfig, feed: PretrainFeed, device: torch.device
) -> dict[str, Any]:
    """Losses of every step in both types, and their differences relative to bfloat16's."""
    curves = {
        name: _curve(shape, dataclasses.replace(config, float8=name == "float8"), feed, device)
        for name in ("bfloat16", "float8")
    }
    pairs = list(zip(curves["float8"]["losses"], curves["bfloat16"]["losses"], strict=True))
    return {
        "curves": curves,
        "end_above": curves["float8"]["end"] / curves["bfloat16"]["end"] - 1,
        "furthest": max(abs(ours - reference) / reference for ours, reference in pairs),
    }


def _curve(
    shape: XverseConfig, config: TrainConfig, feed: PretrainFeed, device: torch.device
) -> dict[str, Any]:
    model = XverseForCausalLM.empty(shape)
    replica = distribute(model, config, World(device=device), initial_weights(shape, seed=0))
    optimizer = make_optimizer(model, config)
    losses, seconds = [], []
    for step in range(config.steps):
        batch = feed.batch(config.sequences(step), config.sequences(step + 1))
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        losses.append(train_step(replica, batch, config)[0])  # synchronises with the device
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
        if (step + 1) % max(1, config.steps // 10) == 0:
            kind = "float8" if config.float8 else "bfloat16"
            notice(f"float8: {kind}, step {step + 1} of {config.steps}, loss {losses[-1]:.4f}")
    tokens = config.batch_size * feed.length
    return {
        "losses": losses,
        "end": statistics.mean(losses[-LAST:]),
        "tokens_per_second": tokens / statistics.median(seconds),
    }
