"""Part of ``xverse bench quant``: the matrix products of a whole model, layer by layer. Bytes per second with
one row, compared with the memory's read rate; operations per second with several rows."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from xverse import hardware
from xverse.bench.report import Row, at_least, need_memory
from xverse.kernels import ops
from xverse.kernels.linear import QuantLinear
from xverse.kernels.native import kernel_name
from xverse.kernels.tiles import TILE_ROWS, tile_rows, tile_shape
from xverse.log import notice
from xverse.model import XverseConfig

KINDS = ("int4", "int8", "bf16", "int3", "int2")
BITS = {"int4": 4, "int8": 8, "int3": 3, "int2": 2}
GROUPS = {4: 128, 8: 128, 3: 64, 2: 64}  # inputs that share a scale, by bits
READ_SHARE = 0.92  # target for one row
GOPS = {8: 700, 512: 750}  # targets of INT4 by rows, in 1e9 multiplications and additions per second
DRIFT = 0.10  # a round is repeated if the read rates before and after it differ by more
ATTEMPTS = 8
Call = Callable[[], object]


def run(
    config: XverseConfig, kinds: tuple[str, ...], rounds: int, threads: int, device: torch.device
) -> dict[str, Any]:
    """Measure random weights of ``config``'s size for each of ``kinds``, with ``threads`` CPU threads or on a
    GPU ``device``."""
    result: dict[str, Any] = {"kernels": kernel_name() if device.type == "cpu" else str(device)}
    buffer = hardware.bandwidth_buffer(str(device))
    for kind in kinds:
        notice(f"quant: generating random {kind} weights")
        need_memory(1.1 * sum(_bytes(kind, *shape) * count for shape, count in _shapes(config)), device)
        layers = _layers(config, kind, device)
        figures = {"rows_1": _read_rate(layers, buffer, kind, rounds, threads)}
        if kind != "bf16":
            for rows in GOPS:
                figures[f"rows_{rows}"] = _operation_rate(layers, kind, rows, rounds)
        result[kind] = figures
        del layers
    return result


def rows(result: dict[str, Any]) -> Iterator[Row]:
    """The lines of the table."""
    for kind in (kind for kind in KINDS if kind in result):
        one = result[kind]["rows_1"]
        share = f"{one['share']:.1%} of the read rate sampled around it"
        yield Row(
            f"{kind}, all layers, 1 row",
            f"{one['gb_s']:.1f} of {one['device_read_gb_s']:.1f} GB/s",
            f"{share}; {at_least(READ_SHARE, one['share'], '')}",
        )
        for count, target in GOPS.items():
            if f"rows_{count}" in result[kind]:
                speed = result[kind][f"rows_{count}"]["gop_s"]
                bound = at_least(target, speed, "GOP/s") if kind == "int4" else ""
                yield Row(f"{kind}, {count} rows", f"{speed:,.0f} GOP/s", bound)


def _shapes(config: XverseConfig) -> list[tuple[tuple[int, int], int]]:
    """(outputs, inputs) of each product, and how many there are."""
    config.without_experts("bench quant")
    size, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    return [
        ((size, size), 4 * layers),
        ((inner, size), 2 * layers),
        ((size, inner), layers),
        ((config.vocab_size, size), 1),
    ]


def _bytes(kind: str, outputs: int, inputs: int) -> int:
    if kind == "bf16":
        return 2 * outputs * inputs
    bits = BITS[kind]
    return math.prod(tile_shape(outputs, inputs, bits, GROUPS[bits]))


def _layers(config: XverseConfig, kind: str, device: torch.device) -> list[list[Any]]:
    """Weights in the order of a forward pass, grouped by the input that they share."""
    size, inner = config.hidden_size, config.intermediate_size

    def make(outputs: int, inputs: int) -> Any:
        if kind == "bf16":
            return torch.full((outputs, inputs), 0.01, dtype=torch.bfloat16, device=device)
        bits = BITS[kind]
        with torch.device("meta"):
            layer = QuantLinear(inputs, outputs, bits, GROUPS[bits])
        layer.tiles = random_tiles(outputs, inputs, bits, GROUPS[bits])
        return layer.to(device)

    groups: list[list[Any]] = []
    for _ in range(config.num_hidden_layers):
        groups += [
            [make(size, size) for _ in range(3)],
            [make(size, size)],
            [make(inner, size) for _ in range(2)],
            [make(size, inner)],
        ]
    return [*groups, [make(config.vocab_size, size)]]


def random_tiles(outputs: int, inputs: int, bits: int, group_size: int) -> Tensor:
    """Tiles of random integers, generated at memory speed; weights have a deviation of about 0.02."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (TILE_ROWS, inputs * bits // 8), dtype=torch.uint8, generator=generator)
    deviation = 2**bits / 12**0.5  # of uniformly distributed integers
    scales = torch.full((TILE_ROWS, inputs // group_size), 0.02 / deviation, dtype=torch.bfloat16)
    tiles = torch.empty(tile_shape(outputs, inputs, bits, group_size), dtype=torch.uint8)
    return tiles.copy_(tile_rows(rows, scales, bits))


def _calls(layers: list[list[Any]], kind: str, tokens: int) -> list[Call]:
    calls: list[Call] = []
    product = ops.linear_bf16 if kind != "bf16" or layers[0][0].is_cpu else torch.nn.functional.linear
    for group in layers:
        inputs = group[0].shape[1] if kind == "bf16" else group[0].in_features
        x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(0)).bfloat16()
        x = x.to(group[0].device if kind == "bf16" else group[0].tiles.device)
        if kind == "bf16":
            calls += [lambda x=x, weight=weight: product(x, weight) for weight in group]  # type: ignore[misc]
        else:
            calls.append(lambda x=x, group=group: QuantLinear.together(group, x))  # type: ignore[misc]
    return calls


def _time(calls: list[Call]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def _read_rate(
    layers: list[list[Any]], buffer: Tensor, kind: str, rounds: int, threads: int
) -> dict[str, Any]:
    size = sum(
        weight.numel() * 2 if kind == "bf16" else weight.tiles.numel() for group in layers for weight in group
    )
    calls = _calls(layers, kind, 1)
    _time(calls)
    reads = [hardware.read_bandwidth(buffer, threads, seconds=0.2)]
    kept: list[tuple[float, float]] = []
    dropped = 0
    while len(kept) < rounds and dropped < ATTEMPTS:
        seconds = _time(calls)
        reads.append(hardware.read_bandwidth(buffer, threads, seconds=0.2))
        before, after = reads[-2:]
        if abs(before - after) > DRIFT * min(before, after):
            dropped += 1  # the memory's speed changed meanwhile
            continue
        kept.append((size / seconds, (before + after) / 2))
    if not kept:  # the read rate never settled: use every round; the samples show it
        kept = [
            (size / _time(calls), statistics.mean(pair))
            for pair in itertools.islice(itertools.pairwise(reads), rounds)
        ]
    return {
        "gb": round(size / 1e9, 3),
        "gb_s": round(statistics.median(rate for rate, _ in kept) / 1e9, 2),
        "runs_gb_s": [round(rate / 1e9, 2) for rate, _ in kept],
        "share": round(statistics.median(rate / bound for rate, bound in kept), 4),
        "device_read_gb_s": round(statistics.median(bound for _, bound in kept) / 1e9, 2),
        "device_read_samples_gb_s": [round(rate / 1e9, 2) for rate in reads],
        "rounds_dropped_for_drift": dropped,
    }


@torch.inference_mode()
def _operation_rate(layers: list[list[Any]], kind: str, tokens: int, rounds: int) -> dict[str, Any]:
    # A pass of 512 rows over the whole model takes 15 s; a few layers represent all.
    part = layers if tokens <= 8 else layers[:8]
    operations = sum(2 * tokens * w.in_features * w.out_features for group in part for w in group)
    calls = _calls(part, kind, tokens)
    _time(calls)
    runs = [operations / _time(calls) / 1e9 for _ in range(rounds)]
    return {"gop_s": round(statistics.median(runs), 1), "runs_gop_s": [round(run, 1) for run in runs]}
