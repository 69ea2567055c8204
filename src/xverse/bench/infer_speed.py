"""Prefill and decode speed through the engine, against the measured memory bandwidth and matmul rate."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from xverse import hardware
from xverse.bench.report import (
    GPU_MATMUL,
    MATMUL,
    Row,
    at_least,
    count_threads,
    in_gb,
    need_memory,
    say_gb,
    show,
)
from xverse.bench.weights import placeholder_tokenizer, random_model
from xverse.config import UserError
from xverse.device import compute_device, guard, weights_dtype
from xverse.engine import Engine, Request, SamplingParams
from xverse.engine.cache import position_bytes
from xverse.engine.load import ONE_THREAD_BELOW, load_weights
from xverse.formats import ModelDirectory
from xverse.formats.quantize import quick_settings, stored_bytes
from xverse.hardware import resident_memory
from xverse.kernels.linear import weights_kind
from xverse.log import notice
from xverse.model import XverseConfig, XverseForCausalLM, named_shape
from xverse.model.config import FLOAT32_BELOW
from xverse.model.mlp import RoutedMLP
from xverse.tokenizer import Tokenizer

NANO_TARGET = 100.0  # decoded tokens/s with one request
PREFILL_CHUNK = 512
_SPARE = 2**30  # bytes for the bandwidth buffer, activations and libraries


def load_named(
    model: str,
    shape: str | None,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    batch: int = 1,
    device: str = "auto",
) -> tuple[XverseForCausalLM, Tokenizer]:
    """The weights and tokenizer of ``model``, or random weights of ``shape``. ``dtype`` None: as in chat.

    ``quantize`` (``int8``, ``int4``) quantises a model while loading; for a shape, it selects random
    quantised weights. Raises UserError for an unknown model or shape, a context that is too long, too little
    memory, and a model quantised already.
    """
    directory = None if shape else ModelDirectory.named(model)
    config = directory.config if directory else named_shape(shape or "")
    small = config.num_parameters() < FLOAT32_BELOW
    place = compute_device(device)
    usual = weights_dtype(place) or (torch.float32 if small else torch.bfloat16)
    chosen = getattr(torch, dtype) if dtype else usual
    check_context(config, prompt_tokens, new_tokens, batch)
    size = config.num_parameters() * chosen.itemsize
    if quantize:
        size = stored_bytes(config, quick_settings(quantize, config))
    elif directory and directory.scheme:
        size = sum(file.stat().st_size for file in directory.weight_files)
    cache = position_bytes(config, chosen) * (prompt_tokens + new_tokens) * batch
    need_memory(size + cache + _SPARE, place)
    if directory:
        return load_weights(directory, quantize, chosen, place), directory.tokenizer
    notice(f"infer: generating {size / 1e9:.2f} GB of random weights")
    return random_model(config, chosen, quantize).to(place), placeholder_tokenizer(config.vocab_size)


def measure(
    model: XverseForCausalLM,
    tokenizer: Tokenizer,
    name: str,
    *,
    prompt_tokens: int,
    new_tokens: int,
    batch: int = 1,
    threads: int | None = None,
    rounds: int = 3,
) -> dict[str, Any]:
    """Medians over ``rounds``; the machine's read bandwidth is sampled before and after each.

    Prefill is timed with one prompt. Decoding is timed over ``new_tokens`` greedy steps while all ``batch``
    requests decode and none prefills; the tokens of the whole batch count.
    """
    config = model.config
    check_context(config, prompt_tokens, new_tokens, batch)
    threads = threads or default_threads(config)
    dtype, device = model.model.norm.weight.dtype, model.model.norm.weight.device
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(4, tokenizer.vocab_size, (batch, prompt_tokens), generator=generator).tolist()
    notice(
        f"infer {name}: {rounds} rounds of {prompt_tokens} + {new_tokens} tokens, {count_threads(threads)}"
    )
    shape = MATMUL if device.type == "cpu" else GPU_MATMUL
    with hardware.using_threads(threads), guard(device):
        matmul = [hardware.matmul_flops(dtype, *shape, device, seconds=0.2)]
        buffer = hardware.bandwidth_buffer(str(device))
        # No prefix cache, because rounds repeat their prompts.
        chunk = PREFILL_CHUNK if device.type == "cpu" else None
        engine = Engine(model, tokenizer, max_batch=batch, prefill_chunk=chunk, prefix_cache_bytes=0)
        _round(engine, prompts[:1], min(new_tokens, 4))  # touches every weight once
        reads = [hardware.read_bandwidth(buffer, threads, seconds=0.2)]
        runs = []
        for _ in range(rounds):
            runs.append(_round(engine, prompts, new_tokens))
            reads.append(hardware.read_bandwidth(buffer, threads, seconds=0.2))
        buffer_bytes = buffer.numel() * buffer.element_size()
        del buffer
        matmul.append(hardware.matmul_flops(dtype, *shape, device, seconds=0.2))
    decode_tok_s = statistics.median(batch * new_tokens / run["decode_s"] for run in runs)
    prefill_tok_s = statistics.median(prompt_tokens / run["prefill_s"] for run in runs)
    read = [_step_bytes(model, batch, run["positions"]) * new_tokens / run["decode_s"] for run in runs]
    around = [(before + after) / 2 for before, after in itertools.pairwise(reads)]
    shares = [rate / bound for rate, bound in zip(read, around, strict=True)]
    resident = [run["resident"] for run in runs if run["resident"] is not None]
    tflops = prefill_flops(config, prompt_tokens) / prompt_tokens * prefill_tok_s / 1e12
    weight_bytes = _tensor_bytes(model)
    result = {
        "bench": "infer",
        "model": name,
        "parameters": config.num_parameters(),
        "dtype": str(dtype).removeprefix("torch."),
        "weights": weights_kind(model),
        "device": str(device),
        "threads": threads,
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "context": prompt_tokens + new_tokens,
        "rounds": rounds,
        "decode_tok_s": round(decode_tok_s, 2),
        "prefill_tok_s": round(prefill_tok_s, 2),
        "decode_runs_tok_s": [round(batch * new_tokens / run["decode_s"], 2) for run in runs],
        "prefill_runs_tok_s": [round(prompt_tokens / run["prefill_s"], 2) for run in runs],
        "weights_gb": in_gb(weight_bytes),
        "rss_gb": in_gb(max(resident) - buffer_bytes) if resident else None,
        "read_gb_s": round(statistics.median(read) / 1e9, 3),
        "device_read_gb_s": round(statistics.median(reads) / 1e9, 3),
        "device_read_samples_gb_s": [round(rate / 1e9, 3) for rate in reads],
        "read_share": round(statistics.median(shares), 4),
        "prefill_tflops": round(tflops, 5),
        "matmul_tflops": [round(rate / 1e12, 5) for rate in matmul],
        "prefill_matmul_share": round(tflops * 1e12 / statistics.mean(matmul), 4),
    }
    show(f"infer {name}: {result['weights']}, {count_threads(threads)}, batch {batch}", _rows(result))
    return result


def default_threads(config: XverseConfig) -> int:
    """The number of threads that ``xverse chat`` would use."""
    return 1 if config.num_parameters() < ONE_THREAD_BELOW else hardware.cores().usable


def _rows(result: dict[str, Any]) -> Iterator[Row]:
    nano = result["model"] == "nano" and result["batch"] == 1
    target = at_least(NANO_TARGET, result["decode_tok_s"], "tok/s") if nano else ""
    context = f"{result['prompt_tokens']} + {result['new_tokens']} tokens"
    yield Row(f"decode, {context}", f"{result['decode_tok_s']:,.1f} tok/s", target)
    bound = f"{result['read_share']:.0%} of {result['device_read_gb_s']:.1f} GB/s sampled around it"
    if result["weights_gb"] * 1e9 < hardware.last_level_cache():
        bound += "; the weights fit into the last-level cache, so memory bandwidth does not bound it"
    yield Row("  weights and KV read", f"{result['read_gb_s']:.2f} GB/s", bound)
    peak = statistics.mean(result["matmul_tflops"])
    yield Row("prefill, one prompt", f"{result['prefill_tok_s']:,.1f} tok/s")
    bound = f"{result['prefill_matmul_share']:.0%} of {peak:.3f} TFLOP/s measured ({result['dtype']} matmul)"
    yield Row("  causal attention counted", f"{result['prefill_tflops']:.3f} TFLOP/s", bound)
    weights = f"weights {say_gb(result['weights_gb'])}"
    yield Row("memory while decoding", say_gb(result["rss_gb"]), weights)


def _round(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, Any]:
    """Time the prefill of the first prompt, prefill the others, then time ``new_tokens`` steps of all.

    ``positions``: cached positions read by a timed step, on average, over all requests.
    """
    longest = _positions(len(prompts[0]), new_tokens, len(prompts)) - len(prompts[0])
    requests = [
        Request(prompt_ids=ids, sampling=SamplingParams.greedy(longest), stop_ids=()) for ids in prompts
    ]
    start = time.perf_counter()
    handles = [engine.submit(requests[0])]
    produced = dict.fromkeys(handles, 0)
    while not produced[handles[0]]:
        _count(engine, produced)
    prefill = time.perf_counter() - start
    handles += [engine.submit(request) for request in requests[1:]]
    produced |= dict.fromkeys(handles[1:], 0)
    while not all(produced.values()):
        _count(engine, produced)
    first = sum(len(prompts[0]) + count for count in produced.values())
    start = time.perf_counter()
    for _ in range(new_tokens):
        assert len(engine.step()) == len(prompts), "every request yields one token in each timed step"
    decode = time.perf_counter() - start
    resident = resident_memory(engine.device)
    for handle in handles:
        engine.cancel(handle)
    positions = first + len(prompts) * (new_tokens - 1) / 2
    return {"prefill_s": prefill, "decode_s": decode, "positions": positions, "resident": resident}


def _count(engine: Engine, produced: dict[int, int]) -> None:
    for event in engine.step():
        if event.error:
            raise UserError(event.error)
        produced[event.handle] += 1


def _positions(prompt_tokens: int, new_tokens: int, batch: int) -> int:
    """Positions that the first request may reach, since it decodes while the others prefill."""
    return prompt_tokens + new_tokens + (batch - 1) * -(-prompt_tokens // PREFILL_CHUNK) + 2


def check_context(config: XverseConfig, prompt_tokens: int, new_tokens: int, batch: int) -> None:
    """Raises UserError if the measurement exceeds the model's positions."""
    needed = _positions(prompt_tokens, new_tokens, batch)
    if needed > config.context_length:
        raise UserError(
            f"{prompt_tokens} prompt and {new_tokens} new tokens at batch {batch} need {needed} positions, "
            f"the model has {config.context_length}"
        )


def prefill_flops(config: XverseConfig, tokens: int) -> float:
    """FLOPs of a prompt: all linears for each token, the head for the last one, causal attention."""
    embedding = config.vocab_size * config.hidden_size
    forward = config.flops_per_token(tokens)["causal"] / 3
    return forward * tokens - 2 * embedding * (tokens - 1)


def _step_bytes(model: XverseForCausalLM, batch: int, positions: float) -> float:
    """Bytes read by a decoding step: all weights once (of the embedding, ``batch`` rows), and the keys and
    values of ``positions``."""
    item = model.model.norm.weight.element_size()
    weights = _tensor_bytes(model) - _tensor_bytes(model.model.embed_tokens)
    if model.config.num_experts:  # without those that nobody activates, under even routing
        unused = (1 - model.config.moe_top_k / model.config.num_experts) ** batch
        experts = [m.experts for m in model.modules() if isinstance(m, RoutedMLP)]
        weights -= int(unused * sum(map(_tensor_bytes, experts)))
    kv = 2 * model.config.num_hidden_layers * model.config.kv_size * item
    return weights + batch * model.config.hidden_size * item + kv * positions


def _tensor_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())
