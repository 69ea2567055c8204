"""Rounding weights to integers: upstream's scheme, and groups with a search for the best scale.

All methods are symmetric: a weight is an integer, or an entry of a table, times its group's scale, without a
zero point. The scales are rounded to bfloat16 before the integers are chosen, so that they match the stored
scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xverse.kernels.native import call, library
from xverse.kernels.weight import QuantizedWeight, check_bits, check_group_size

_ROWS_AT_ONCE = 1 << 22  # weights for which PyTorch's search holds copies at a time
_LANES = 32  # partial sums of an error; fixed, so that every instruction set adds in the same order
_SMALLEST = 1e-30  # groups below it become zeros: the reciprocal of the scale would overflow


def rtn_row(weight: Tensor, bits: int) -> QuantizedWeight:
    """Upstream's rounding: one scale for each row of ``weight`` [N, K] that maps its largest magnitude to the
    largest integer, 2^(bits-1) - 1. Raises UserError for unsupported bits."""
    check_bits(bits)
    largest = weight.float().abs().amax(dim=1, keepdim=True)  # [N, 1]
    scales = (largest / ((1 << (bits - 1)) - 1)).bfloat16()
    return QuantizedWeight(round_to(weight, scales, bits), scales, bits)


class Levels:
    """What a weight in units of its scale is rounded to: integers of ``bits``, or entries of ``table`` int8
    [2^bits] in ascending order; the upper of two from the middle between them on."""

    def __init__(self, bits: int, table: Tensor | None = None) -> None:
        self.bits, self.half, self.table = bits, 1 << (bits - 1), table
        self._middles = None if table is None else (table[1:].float() + table[:-1]) / 2

    def value(self, x: Tensor) -> Tensor:
        """The nearest levels to ``x`` float32."""
        if self.table is None:
            return x.clamp(-self.half, self.half - 1).round()
        return self.table[self._place(x)].float()

    def index(self, x: Tensor) -> Tensor:
        """Their signed indices int8; of NaN, any."""
        if self.table is None:
            return self.value(x).nan_to_num(0.0).to(torch.int8)
        return (self._place(x) - self.half).to(torch.int8)

    def of(self, index: Tensor) -> Tensor:
        """The levels float32 of signed indices int8."""
        return (index if self.table is None else self.table[index.int() + self.half]).float()

    def _place(self, x: Tensor) -> Tensor:
        assert self._middles is not None
        return torch.bucketize(x.nan_to_num(-torch.inf), self._middles, right=True)


def rtn(
    weight: Tensor,
    bits: int,
    group_size: int = 128,
    importance: Tensor | None = None,
    table: Tensor | None = None,
) -> QuantizedWeight:
    """Round to nearest with the scale of each row and group of inputs that leaves the smallest squared error.

    ``weight`` [N, K] of any float dtype; ``importance`` float32 [K] weights the error of each input (the mean
    square of its activation), None weights all equally. The search tries a grid of clipping factors with both
    signs (a negative scale gives the integer -2^(bits-1) to positive weights), then refines by least squares.
    With ``table`` int8 [2^bits] weights are rounded to its entries instead of integers.
    The compiled search and PyTorch's give the same bits. A weight that is not finite makes its group's scale
    NaN. Raises UserError for unsupported bits or a group size that is unsupported or does not divide K.
    """
    check_bits(bits)
    check_group_size(group_size, weight.shape[1])
    weight = weight.float().contiguous()
    if importance is None:
        importance = torch.ones(weight.shape[1])
    importance = importance.to(device=weight.device, dtype=torch.float32).contiguous()
    levels = Levels(bits, None if table is None else table.to(weight.device))
    divisors = search_grid(bits, table)
    if library() is not None and weight.device.type == "cpu":
        q = torch.empty(weight.shape, dtype=torch.int8)
        scales = torch.empty(weight.shape[0], weight.shape[1] // group_size, dtype=torch.bfloat16)
        search = group_size, divisors, len(divisors)
        call("xv_round", weight, importance, q, scales, *weight.shape, bits, levels.table, *search)
        return QuantizedWeight(q, scales, bits, levels.table)
    rows = max(1, _ROWS_AT_ONCE // weight.shape[1])
    parts = [_search(part, levels, group_size, importance, divisors) for part in weight.split(rows)]
    q, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return QuantizedWeight(q, scales, bits, levels.table)


def round_to(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The integers int8 [N, K] nearest to ``weight`` [N, K] for ``scales`` bfloat16 [N, K/group]."""
    grouped = weight.float().view(*scales.shape, -1)  # [N, G, group]
    return Levels(bits).value(grouped * _reciprocal(scales)).to(torch.int8).view(weight.shape)


def search_grid(bits: int, table: Tensor | None = None) -> Tensor:
    """Divisors float32 [n], ascending: each divides a group's largest magnitude and gives a scale to try.

    Below 2^(bits-1) - 1 the steps are larger than necessary; above 2^(bits-1) the largest weights clip.
    """
    if table is not None:
        most = {4: 1.35, 3: 1.6, 2: 2.0}[bits]  # the fewer the entries, the more the best scale clips
        return torch.linspace(0.85, most, 7) * table.abs().max().item()
    if bits == 8:
        return torch.tensor([126.0, 127.0, 127.5, 128.0, 130.0, 134.0])
    return torch.arange(6.5, 11.01, 0.25) * (1 << bits) / 16


def _reciprocal(scales: Tensor) -> Tensor:
    scales = scales.float()
    return torch.where(scales == 0, 0.0, 1.0 / scales)[..., None]


def _search(
    weight: Tensor, levels: Levels, group_size: int, importance: Tensor, divisors: Tensor
) -> tuple[Tensor, Tensor]:
    """The search of csrc/rounding.cpp, operation by operation: int8 [N, K], scales bfloat16 [N, G]."""
    grouped = weight.view(weight.shape[0], -1, group_size)  # [N, G, group]
    per_group = importance.view(-1, group_size)  # [G, group]
    largest = grouped.abs().amax(dim=2)  # [N, G]
    largest = torch.where(largest < _SMALLEST, 0.0, largest)
    best_error = torch.full(largest.shape, torch.inf, device=weight.device)
    best_scale = (largest / divisors[0]).bfloat16()  # kept if no error is finite

    def try_scale(scale: Tensor) -> None:
        nonlocal best_error, best_scale
        q = levels.value(grouped * _reciprocal(scale))
        difference = grouped - q * scale.float()[..., None]
        error = _lane_sum(difference * difference * per_group)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)

    for divisor in divisors.tolist():
        scale = (largest / divisor).bfloat16()
        try_scale(scale)
        try_scale(-scale)
    for _ in range(2):
        q = levels.value(grouped * _reciprocal(best_scale))
        numerator, denominator = _lane_sum(grouped * q * per_group), _lane_sum(q * q * per_group)
        try_scale(torch.where(denominator > 0, numerator / denominator, 0.0).bfloat16())
    best_scale = torch.where(largest.isfinite(), best_scale, torch.nan)
    q = levels.index(grouped * _reciprocal(best_scale))
    q = torch.where(largest.isfinite()[..., None], q, 0)
    return q.view(weight.shape), best_scale


def _lane_sum(values: Tensor) -> Tensor:
    """The sum over the last dimension in the order of the compiled code: by lanes, then pairs of lanes."""
    lanes = values[..., :_LANES].clone()
    for start in range(_LANES, values.shape[-1], _LANES):
        lanes += values[..., start : start + _LANES]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]
