"""Bits and groups of each matrix for a given average: ``xverse quantize --bpw X``.

What rounding a matrix costs the model is measured, to second order: KL ≈ ½ E[(g · δ)²] for a change δ of a
matrix's outputs, where g is the gradient of log p(y) by these outputs for a token y drawn from the model
itself (the Fisher information). With errors that are independent between weights this is ½ Σ g_n² x_k² e_nk²:
the mean squares of gradients and inputs come from one forward and backward pass over calibration text, the
rounding errors e from rounding some rows of the matrix in every format. GPTQ's feedback leaves a share of
them, which depends on the inputs alone. Formats are then exchanged for larger ones in the order of KL saved
per byte.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xverse.config import UserError
from xverse.kernels.weight import BITS, GROUP_SIZES
from xverse.model import FullCausal, XverseConfig, XverseForCausalLM
from xverse.quant.equalize import column_rms, equal_factors
from xverse.quant.gptq import HessianFactor
from xverse.quant.methods import rtn
from xverse.quant.settings import Format, QuantSettings, matrices

HEAD = "lm_head"
_ROWS = 128  # of each matrix that are rounded to measure the error
_TOKENS_AT_ONCE = 1024
# Matrices whose gradients' outer products are not measured: the largest, which gain nothing from them.
_LEFT_OUT = (HEAD, "gate_proj", "up_proj")
_TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
)  # one format, so that one call computes them


def parse_bits(text: str) -> float:
    """The value of ``--bpw``. Raises UserError for what no format reaches."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not min(BITS) <= value <= max(BITS) + 0.55:  # with scales in groups of 32 and tensors not rounded
        raise UserError(f"--bpw {text}: expected bits per weight, such as 4.5, from 2 to 8.5")
    return value


@dataclass(frozen=True)
class Sensitivity:
    """Mean squares of a matrix's inputs [K] and of the gradients of log p by its outputs [N], float32; if
    asked for, instead of the latter the mean of their outer products [N, N]. ``left``: the share of rounding
    errors that feedback between columns leaves."""

    inputs: Tensor
    gradients: Tensor
    left: float = 1.0


def measure(
    model: XverseForCausalLM, rows: Tensor, outer: bool = False, feedback: bool = False
) -> dict[str, Sensitivity]:
    """The sensitivity of every linear of an unquantised model, by name, on ``rows`` int64 [n, T]; with
    ``outer`` of the attention's and the last of each network, with ``feedback`` what GPTQ leaves. Experts
    that no token activates have none."""
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    left: dict[str, float] = {}

    def add(sums: dict[str, Tensor], name: str, x: Tensor) -> None:
        x = x.detach().flatten(0, -2).float()
        total = x.T @ x if (outer if sums is gradients else feedback) else x.square().sum(dim=0)
        sums[name] = sums[name].add_(total) if name in sums else total

    def watch(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            add(inputs, name, arguments[0])
            output.register_hook(lambda gradient: add(gradients, name, gradient))

        return hook

    linears = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not (outer and name.endswith(_LEFT_OUT))
    ]
    hooks = [module.register_forward_hook(watch(name)) for name, module in linears]
    generator = torch.Generator(device=rows.device).manual_seed(0)
    embedding = model.model.embed_tokens.register_forward_hook(lambda _m, _i, output: output.requires_grad_())
    try:
        for part in rows.split(max(1, _TOKENS_AT_ONCE // rows.shape[1])):
            with torch.enable_grad():
                logs = (
                    model(part, FullCausal(len(part), part.shape[1], part.device))
                    .float()
                    .log_softmax(-1)
                    .flatten(0, 1)
                )
                drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
                logs.gather(1, drawn).sum().backward()
    finally:
        for handle in (*hooks, embedding):
            handle.remove()
    count = rows.numel()
    for name in inputs if feedback else ():
        left[name] = _left(inputs[name])
        inputs[name] = inputs[name].diagonal().clone()
    return {
        name: Sensitivity(inputs[name].div_(count), gradients[name].div_(count), left.get(name, 1.0))
        for name, _ in linears
        if name in gradients
    }


def _left(total: Tensor) -> float:
    """The mean share of a column's error that feedback leaves, from the inputs' outer products [K, K]."""
    factors = total.diagonal().clamp(min=1e-30).rsqrt()
    return HessianFactor(total * factors * factors[:, None]).importance.mean().item()


def candidates(inputs: int, table: bool = True) -> list[Format]:
    """The formats of a matrix with ``inputs`` inputs, from the smallest; with integers only those of 4 and 8
    bits."""
    groups = [size for size in sorted(GROUP_SIZES, reverse=True) if inputs % size == 0]
    few = (2, 3, 4) if table else (4,)
    return [(bits, size) for bits in few for size in groups] + [(8, size) for size in groups[:1]]


def rounding_cost(
    weight: Tensor, form: Format, sensitivity: Sensitivity, table: Tensor | None = None
) -> float:
    """The KL divergence, nats per token, that rounding ``weight`` [N, K] to ``form`` adds (second order)."""
    step = max(1, len(weight) // _ROWS)
    chosen = torch.arange(step // 2, len(weight), step)
    part = weight[chosen].float().to(sensitivity.inputs.device)
    factors = equal_factors(sensitivity.inputs.sqrt(), column_rms([part]))
    part, squares = part * factors, sensitivity.inputs / factors.square()
    error = (part - rtn(part, *form, squares, table).dequantize()).square() @ squares  # [rows]
    cost = 0.5 * (error @ sensitivity.gradients[chosen]).item() * len(weight) / len(chosen)
    return cost * sensitivity.left


@dataclass(frozen=True)
class Unit:
    """Matrices that share a format: bytes and cost of each candidate."""

    names: tuple[str, ...]
    formats: tuple[Format, ...]
    sizes: tuple[float, ...]
    costs: tuple[float, ...]


def measure_units(
    config: XverseConfig,
    sensitivities: Mapping[str, Sensitivity],
    weights: Mapping[str, Tensor],
    settings: QuantSettings,
) -> list[Unit]:
    """The costs of all matrices in all formats; ``weights`` by name; ``settings`` has the tables."""
    units = []
    for shapes in _units(config):
        formats = tuple(candidates(shapes[0][2], settings.table))
        sizes, costs = [], []
        for form in formats:
            bits, table = form[0] + 16 / form[1], settings.table_of(form[0])
            apart = 0 if table is None else len(table)
            sizes.append(sum(outputs * inputs * bits / 8 + apart for _, outputs, inputs in shapes))
            found = (rounding_cost(weights[name], form, sensitivities[name], table) for name, _, _ in shapes)
            costs.append(sum(found))
        units.append(Unit(tuple(name for name, _, _ in shapes), formats, tuple(sizes), tuple(costs)))
    return units


def _units(config: XverseConfig) -> Iterator[list[tuple[str, int, int]]]:
    waiting: list[tuple[str, int, int]] = []
    for matrix in matrices(config):
        waiting.append(matrix)
        child = matrix[0].rpartition(".")[2]
        if not any(child in names[:-1] for names in _TOGETHER):
            yield waiting
            waiting = []
    yield [(HEAD, config.vocab_size, config.hidden_size)]


def choose_formats(units: list[Unit], bits: float, weights: int, spent: float = 0.0) -> dict[str, Format]:
    """The format of every matrix for an average of at most ``bits`` per weight, of ``weights`` weights and
    ``spent`` bytes for tensors that are not rounded.

    Raises UserError if the average is outside the range of the formats.
    """
    budget = bits * weights / 8 - spent
    least, most = (sum(pick(unit.sizes) for unit in units) for pick in (min, max))
    low, high = (8 * (size + spent) / weights for size in (least, most))
    if not (least <= budget and bits <= high + 0.05):
        low = math.ceil(low * 1000) / 1000  # so that the value that is shown is accepted
        raise UserError(f"--bpw {bits:g}: this model takes {low:.3f} to {high:.3f} bits per weight")
    chosen = [0] * len(units)
    steps = sorted(
        ((gain, index, number) for index, unit in enumerate(units) for number, gain in _hull(unit)),
        reverse=True,
    )
    left = budget - least
    closed: set[int] = set()
    for _, index, number in steps:
        unit = units[index]
        size = unit.sizes[number] - unit.sizes[chosen[index]]
        if index in closed or size > left:
            closed.add(index)
            continue
        chosen[index], left = number, left - size
    return {name: unit.formats[at] for unit, at in zip(units, chosen, strict=True) for name in unit.names}


def describe_mix(formats: Mapping[str, Format]) -> str:
    """How many matrices have which format, as text."""
    counts = Counter(formats.values())
    return ", ".join(
        f"{count} with {bits} bits in groups of {group}" for (bits, group), count in sorted(counts.items())
    )


def _hull(unit: Unit) -> Iterator[tuple[int, float]]:
    """The candidates after the first on the lower convex hull of cost by size, and their saving per byte."""
    at = 0
    while True:
        gains = [
            ((unit.costs[at] - unit.costs[i]) / (unit.sizes[i] - unit.sizes[at]), i)
            for i in range(at + 1, len(unit.sizes))
        ]
        gain, best = max(gains, default=(0.0, at))
        if gain <= 0:
            return
        yield best, gain
        at = best
