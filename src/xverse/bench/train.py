"""Pretraining speed against transformers' Llama: same shape, weights, batch, precision, optimizer and run.

Both are trained with bf16 autocast over float32 parameters, fused AdamW and gradient clipping. Ours takes
``train/``'s own step; the peer takes its own forward pass and loss, without a cache. They run in turn, A B A
B, so that a change of the machine's speed meets both, and the ratio is the median over the pairs.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from xverse import hardware
from xverse.bench.report import (
    MATMUL,
    Row,
    at_least,
    count_threads,
    in_gb,
    need_memory,
    process_memory,
    say_gb,
    show,
    using_threads,
)
from xverse.config import UserError
from xverse.data.feed import Batch
from xverse.formats.write import llama_config
from xverse.log import notice
from xverse.model import IGNORE, XverseConfig, XverseForCausalLM, init_weights, named_shape
from xverse.train.loop import TrainConfig, train_step
from xverse.train.optimizer import make_adamw
from xverse.train.report import flops_per_token

RATIO_TARGET = 1.0  # of transformers' tokens/s, at shape mini
LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIP = 3e-4, 0.1, (0.9, 0.95), 1.0
BLOCKS = 4
MEMORY_STEPS = 2  # the optimizer's moments appear in the first one
SIDES = ("xverse", "transformers")

# A fresh process, so that neither side's memory is part of the other's.
CHILD = "import sys; from xverse.bench.train import child; child(sys.argv[1])"


def run(
    shape: str = "mini",
    *,
    batch_size: int = 8,
    sequence_length: int = 512,
    steps: int = 12,
    threads: int | None = None,
) -> dict[str, Any]:
    """Measure a named shape. Raises UserError for an unknown one, too few steps or too little memory."""
    config = named_shape(shape)
    return measure(
        config, shape, batch_size=batch_size, sequence_length=sequence_length, steps=steps, threads=threads
    )


def measure(
    config: XverseConfig,
    name: str,
    *,
    batch_size: int,
    sequence_length: int,
    steps: int,
    threads: int | None = None,
    memory_of: Sequence[str] = SIDES,
) -> dict[str, Any]:
    """Up to ``steps`` timed steps of each side in equal blocks, at least three, after one that warms up;
    peak memory of the sides in ``memory_of``."""
    if steps < 3:
        raise UserError(f"steps: {steps} are too few for a median of pairs (at least 3)")
    if not 2 <= sequence_length <= config.context_length:
        raise UserError(f"sequence_length: {sequence_length} is out of range (2 to {config.context_length})")
    threads = threads or hardware.cores().usable
    need_memory(estimated_memory(config, batch_size, sequence_length))
    notice(f"train {name}: peak memory of each side in a process of its own")
    memory = {side: peak_memory(side, config, batch_size, sequence_length, threads) for side in memory_of}
    block = max(1, steps // BLOCKS)
    with using_threads(threads):
        matmul = [hardware.matmul_flops(torch.bfloat16, *MATMUL)]
        takers = {side: stepper(side, config, batch_size, sequence_length) for side in SIDES}
        first_loss = {side: round(take(), 5) for side, take in takers.items()}
        difference = abs(first_loss["xverse"] - first_loss["transformers"])
        assert difference < 0.05, f"the two do not train the same model: first losses {first_loss}"
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for number in range(steps // block):
            for side, take in takers.items():
                start = time.perf_counter()
                for _ in range(block):
                    take()
                seconds[side].append((time.perf_counter() - start) / block)
            notice(f"train {name}: pair {number + 1} of {steps // block}")
        del takers, take
        matmul.append(hardware.matmul_flops(torch.bfloat16, *MATMUL))
    tokens = batch_size * sequence_length
    ratios = [theirs / ours for ours, theirs in zip(seconds["xverse"], seconds["transformers"], strict=True)]
    flops = flops_per_token(config, sequence_length)
    peak = statistics.mean(matmul)
    result: dict[str, Any] = {
        "bench": "train",
        "model": name,
        "parameters": config.num_parameters(),
        "dtype": "bfloat16 autocast, float32 parameters",
        "threads": threads,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "steps": steps // block * block,
        "block_steps": block,
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "flops_per_token": flops,
        "matmul_tflops": [round(rate / 1e12, 5) for rate in matmul],
        "first_loss": first_loss,
    }
    for side in SIDES:
        speed = tokens / statistics.median(seconds[side])
        result[side] = {
            "tokens_s": round(speed, 2),
            "step_s": [round(each, 4) for each in seconds[side]],
            "tflops": {kind: round(speed * count / 1e12, 5) for kind, count in flops.items()},
            "matmul_share": {kind: round(speed * count / peak, 4) for kind, count in flops.items()},
            "peak_rss_gb": in_gb(memory.get(side)),
        }
    title = f"train {name}: batch {batch_size} × {sequence_length}, bf16 autocast, {count_threads(threads)}"
    show(title, _rows(result, peak))
    return result


def _rows(result: dict[str, Any], peak: float) -> Iterator[Row]:
    target = at_least(RATIO_TARGET, result["ratio"], "×") if result["model"] == "mini" else ""
    pairs = ", ".join(f"{ratio:.2f}" for ratio in result["ratios"])
    yield Row("xverse / transformers, tokens/s", f"{result['ratio']:.3f} × (median of {pairs})", target)
    for side in SIDES:
        found = result[side]
        yield Row(f"{side}", f"{found['tokens_s']:,.1f} tokens/s")
        for kind in ("full", "causal"):
            bound = f"{found['matmul_share'][kind]:.0%} of {peak / 1e12:.3f} TFLOP/s measured (bf16 matmul)"
            yield Row(f"  attention counted {kind}", f"{found['tflops'][kind]:.3f} TFLOP/s", bound)
        least = f"parameters, gradients, moments: {16 * result['parameters'] / 1e9:.3f} GB"
        yield Row("  peak RSS", say_gb(found["peak_rss_gb"]), least)


def estimated_memory(config: XverseConfig, batch_size: int, length: int) -> int:
    """Bytes that both sides take at their fullest: float32 parameters, gradients and two moments of each;
    the peer's activations, with logits in float32 and bfloat16 and attention scores."""
    layer = 20 * config.hidden_size + 10 * config.intermediate_size + 10 * config.num_attention_heads * length
    activations = config.num_hidden_layers * layer + 16 * config.vocab_size
    return 32 * config.num_parameters() + batch_size * length * activations


def random_batch(config: XverseConfig, batch_size: int, length: int) -> Batch:
    """One document of random tokens per row, each position but the last with its successor as target."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, config.vocab_size, (batch_size, length), generator=generator)  # [B, T]
    targets = torch.full_like(tokens, IGNORE)
    targets[:, :-1] = tokens[:, 1:]
    return Batch(tokens, targets, torch.zeros_like(tokens, dtype=torch.int32))


def stepper(side: str, config: XverseConfig, batch_size: int, length: int) -> Callable[[], float]:
    """A function that takes one training step and returns its loss; both sides start from equal weights."""
    model = XverseForCausalLM(config)
    init_weights(model, seed=0)
    batch = random_batch(config, batch_size, length)
    return _ours(model, batch) if side == "xverse" else _theirs(model, batch)


def _ours(model: XverseForCausalLM, batch: Batch) -> Callable[[], float]:
    optimizer = make_adamw(model, weight_decay=WEIGHT_DECAY, betas=BETAS)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    config = TrainConfig(
        steps=1, batch_size=len(batch.tokens), learning_rate=LEARNING_RATE, grad_clip=CLIP, dtype="bfloat16"
    )

    def take() -> float:
        loss, _ = train_step(model, batch, config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return take


def _theirs(model: XverseForCausalLM, batch: Batch) -> Callable[[], float]:
    from transformers import LlamaConfig, LlamaForCausalLM

    values = llama_config(model.config, torch.float32)
    values.pop("torch_dtype")
    peer = LlamaForCausalLM(LlamaConfig(**{**values, "use_cache": False})).train()
    peer.load_state_dict(model.state_dict())
    parameters = list(peer.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS, fused=True
    )

    def take() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = peer(input_ids=batch.tokens, labels=batch.tokens).loss  # it shifts the labels itself
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return take


def peak_memory(side: str, config: XverseConfig, batch_size: int, length: int, threads: int) -> int | None:
    """Peak resident set of a fresh process that trains one side; None where there is no /proc."""
    job = {
        "side": side,
        "config": config.to_json(),
        "batch_size": batch_size,
        "length": length,
        "threads": threads,
    }
    command = [sys.executable, "-c", CHILD, json.dumps(job)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def child(job: str) -> None:
    """What the fresh process does: some steps, then its own peak on stdout."""
    values = json.loads(job)
    torch.set_num_threads(values["threads"])
    config = XverseConfig.from_json(values["config"])
    take = stepper(values["side"], config, values["batch_size"], values["length"])
    for _ in range(MEMORY_STEPS):
        take()
    print(json.dumps(process_memory("VmHWM")))
