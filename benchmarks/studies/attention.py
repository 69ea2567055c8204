"""Attention over a paged cache compared with its bounds.

Decode is compared with the memory's read rate, prefill with PyTorch's attention and a plain matrix product.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from xverse import hardware
from xverse.bench.options import add_rounds, add_threads
from xverse.bench.report import MATMUL, Row, at_least, count_threads, need_memory, show
from xverse.kernels.native import kernel_name
from xverse.kernels.ops import advise_huge_pages
from xverse.kernels.paged_attention import PagedLayer

CONTEXTS = (512, 2048, 8192)
POSITIONS = 32768  # in all layers together: more than any CPU cache holds
PREFILL_TOKENS = 512
PREFILL_STARTS = (0, 1536)
READ_SHARE = 0.9
FASTER = 1.3  # than PyTorch's attention
_TYPES = {"bf16": torch.bfloat16, "int8": torch.int8}


def arguments(parser: argparse.ArgumentParser) -> None:
    add_rounds(parser, 5)
    add_threads(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    threads = args.threads or hardware.cores().usable
    with hardware.using_threads(threads):
        result = measure(threads, args.rounds)
    show(f"attention, {count_threads(threads)}: {result['kernels']}", rows(result))
    return {"bench": "attention", "threads": threads, "rounds": args.rounds, **result}


def measure(
    threads: int,
    rounds: int = 5,
    *,
    heads: int = 32,
    head_dim: int = 128,
    block_size: int = 32,
    contexts: tuple[int, ...] = CONTEXTS,
    positions: int = POSITIONS,
    prefill_tokens: int = PREFILL_TOKENS,
    prefill_starts: tuple[int, ...] = PREFILL_STARTS,
) -> dict[str, Any]:
    """Medians over ``rounds`` of one sequence, with ``threads`` of PyTorch's threads. In GB/s and GFLOP/s."""
    need_memory(6 * positions * heads * head_dim + 2**30)
    result: dict[str, Any] = {"kernels": kernel_name(), "heads": heads, "head_dim": head_dim}
    result["decode"] = []
    buffer = hardware.bandwidth_buffer()
    for kind in _TYPES:
        for context in contexts:
            layers = max(1, positions // context)
            cache = _random_cache(layers * -(-context // block_size), heads, block_size, head_dim, kind)
            figures = _decode_rate(cache, context, layers, buffer, rounds, threads)
            result["decode"].append({"kv": kind, "context": context, **figures})
            del cache
    del buffer
    result["prefill"] = []
    for start in prefill_starts:
        figures = _prefill_rates(start, prefill_tokens, heads, block_size, head_dim, rounds)
        result["prefill"].append({"start": start, "tokens": prefill_tokens, **figures})
    return result


def rows(result: dict[str, Any]) -> Iterator[Row]:
    """The lines of the table."""
    for figures in result["decode"]:
        share = f"{figures['share']:.1%} of the read rate sampled around it"
        target = at_least(READ_SHARE, figures["share"], "") if figures["context"] >= 2048 else ""
        yield Row(
            f"decode, {figures['kv']} KV, context {figures['context']:,}",
            f"{figures['gb_s']:.1f} of {figures['device_read_gb_s']:.1f} GB/s",
            f"{share}; {target}" if target else share,
        )
    for figures in result["prefill"]:
        name = f"prefill, {figures['tokens']} tokens from {figures['start']:,}"
        faster = figures["bf16_gflops"] / figures["sdpa_gflops"]
        yield Row(
            f"{name}, bf16 KV",
            f"{figures['bf16_gflops']:,.0f} GFLOP/s",
            f"{figures['bf16_gflops'] / figures['matmul_gflops']:.0%} of a bf16 matmul; {faster:.1f} × "
            f"PyTorch's attention ({figures['sdpa_gflops']:,.0f}); {at_least(FASTER, faster, '×')}",
        )
        yield Row(f"{name}, int8 KV", f"{figures['int8_gflops']:,.0f} GFLOP/s")


def _random_cache(blocks: int, heads: int, block_size: int, head_dim: int, kind: str) -> PagedLayer:
    shape = (blocks, 2, heads, block_size, head_dim)
    data = torch.empty(shape, dtype=_TYPES[kind])
    advise_huge_pages(data)
    if kind == "int8":
        data.random_(-127, 128)
        scales = torch.rand(shape[:-1]) * 0.01
        return PagedLayer(data[:, 0], data[:, 1], scales[:, 0], scales[:, 1])
    data.normal_()
    return PagedLayer(data[:, 0], data[:, 1])


def _decode_rate(
    cache: PagedLayer, context: int, layers: int, buffer: Tensor, rounds: int, threads: int
) -> dict[str, Any]:
    """Decode a token of one sequence through ``layers`` layers, which are parts of one cache."""
    blocks = -(-context // cache.block_size)
    tables = torch.arange(layers * blocks, dtype=torch.int32).view(layers, 1, blocks)
    lengths = torch.tensor([context], dtype=torch.int32)
    q = torch.randn(1, cache.heads, cache.head_dim).bfloat16()

    def step() -> None:
        for table in tables:
            cache.attend(q, table, lengths)

    vector = cache.head_dim * cache.keys.element_size() + (4 if cache.key_scales is not None else 0)
    size = 2 * layers * context * cache.heads * vector
    step()
    reads = [hardware.read_bandwidth(buffer, threads, seconds=0.2)]
    rates, shares = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        rates.append(size / (time.perf_counter() - start))
        reads.append(hardware.read_bandwidth(buffer, threads, seconds=0.2))
        shares.append(2 * rates[-1] / (reads[-2] + reads[-1]))
    return {
        "gb_s": round(statistics.median(rates) / 1e9, 3),
        "device_read_gb_s": round(statistics.median(reads) / 1e9, 3),
        "share": round(statistics.median(shares), 4),
        "positions_per_s": round(layers * context * statistics.median(rates) / size),
    }


def _prefill_rates(
    start: int, tokens: int, heads: int, block_size: int, head_dim: int, rounds: int
) -> dict[str, float]:
    """FLOPs count every pair of a query and a key that it attends to."""
    flops = 4 * heads * head_dim * (start * tokens + tokens * (tokens + 1) / 2)
    blocks = -(-(start + tokens) // block_size)
    table = torch.arange(blocks, dtype=torch.int32)
    q = torch.randn(tokens, heads, head_dim).bfloat16()
    figures = {}
    for kind in _TYPES:
        cache = _random_cache(blocks, heads, block_size, head_dim, kind)
        seconds = _median_time(lambda cache=cache: cache.prefill(q, table, start), rounds)  # type: ignore[misc]
        figures[f"{kind}_gflops"] = round(flops / seconds / 1e9, 4)
    keys, values = torch.randn(2, 1, heads, start + tokens, head_dim).bfloat16()
    queries = q.transpose(0, 1)[None]  # [1, H, T, head_dim]
    positions = torch.arange(start + tokens)
    mask = positions <= positions[start:, None] if start else None  # [T, S]
    seconds = _median_time(
        lambda: scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=not start),
        rounds,
    )
    figures["sdpa_gflops"] = round(flops / seconds / 1e9, 4)
    figures["matmul_gflops"] = round(hardware.matmul_flops(torch.bfloat16, *MATMUL, seconds=0.2) / 1e9, 4)
    return figures


def _median_time(action: Callable[[], object], rounds: int) -> float:
    action()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
