"""Rounding weights to integers: upstream's scheme, and groups whose scale is searched for.

Everything here is symmetric: a weight is an integer times its group's scale, with no zero point. The scales
are rounded to bfloat16 before the integers are chosen, so that the integers fit what is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xverse.kernels.native import library
from xverse.kernels.weight import QuantizedWeight, check_bits, check_group_size

_ROWS_AT_ONCE = 1 << 22  # weights of which PyTorch's search holds copies at a time
_LANES = 32  # partial sums of an error; fixed, so that every instruction set adds in the same order
_SMALLEST = 1e-30  # a group below it becomes zeros: the reciprocal of its scale would overflow


def rtn_row(weight: Tensor, bits: int) -> QuantizedWeight:
    """Upstream's rounding: one scale for each row of ``weight`` [N, K], which maps its largest magnitude to
    the largest integer, 2^(bits-1) - 1. Raises UserError for bits other than 4 and 8."""
    check_bits(bits)
    largest = weight.float().abs().amax(dim=1, keepdim=True)  # [N, 1]
    scales = (largest / ((1 << (bits - 1)) - 1)).bfloat16()
    return QuantizedWeight(round_to(weight, scales, bits), scales, bits)


def rtn(
    weight: Tensor, bits: int, group_size: int = 128, importance: Tensor | None = None
) -> QuantizedWeight:
    """Round to nearest with the scale of each row and group of inputs that leaves the smallest squared error.

    ``weight`` [N, K] of any float type; ``importance`` float32 [K] weighs the error of each input (the mean
    square of its activation), None weighs all alike. Scales are tried over a grid of clipping factors and
    both signs (a negative one gives the side of -2^(bits-1) to positive weights), then refined by least
    squares. The compiled search and PyTorch's give the same bits. A weight that is not finite makes its
    group's scale NaN. Raises UserError for bits or a group size that is not offered or does not divide K.
    """
    check_bits(bits)
    check_group_size(group_size, weight.shape[1])
    weight = weight.float().contiguous()
    if importance is None:
        importance = torch.ones(weight.shape[1])
    importance = importance.to(device=weight.device, dtype=torch.float32).contiguous()
    divisors = search_grid(bits)
    kernels = library()
    if kernels is not None and weight.device.type == "cpu":
        q = torch.empty(weight.shape, dtype=torch.int8)
        scales = torch.empty(weight.shape[0], weight.shape[1] // group_size, dtype=torch.bfloat16)
        kernels.xv_round(
            weight.data_ptr(), importance.data_ptr(), q.data_ptr(), scales.data_ptr(), *weight.shape, bits,
            group_size, divisors.data_ptr(), len(divisors), torch.get_num_threads(),
        )  # fmt: skip
        return QuantizedWeight(q, scales, bits)
    rows = max(1, _ROWS_AT_ONCE // weight.shape[1])
    parts = [_search(part, bits, group_size, importance, divisors) for part in weight.split(rows)]
    q, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return QuantizedWeight(q, scales, bits)


def round_to(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The integers int8 [N, K] that are nearest to ``weight`` for given ``scales`` bfloat16 [N, K/group]."""
    grouped = weight.float().view(*scales.shape, -1)  # [N, G, group]
    return _integers(grouped, _reciprocal(scales), bits).to(torch.int8).view(weight.shape)


def search_grid(bits: int) -> Tensor:
    """What a group's largest magnitude is divided by to get the scales that are tried, float32, ascending.

    Below 2^(bits-1) - 1 the grid is coarser than need be; above 2^(bits-1) the largest weights are clipped.
    """
    if bits == 8:
        return torch.tensor([126.0, 127.0, 127.5, 128.0, 130.0, 134.0])
    return torch.arange(6.5, 11.01, 0.25)


def _reciprocal(scales: Tensor) -> Tensor:
    scales = scales.float()
    return torch.where(scales == 0, 0.0, 1.0 / scales)[..., None]


def _integers(grouped: Tensor, reciprocal: Tensor, bits: int) -> Tensor:
    half = 1 << (bits - 1)
    return (grouped * reciprocal).clamp(-half, half - 1).round()


def _search(
    weight: Tensor, bits: int, group_size: int, importance: Tensor, divisors: Tensor
) -> tuple[Tensor, Tensor]:
    """The search of csrc/rounding.cpp, operation by operation."""
    grouped = weight.view(weight.shape[0], -1, group_size)  # [N, G, group]
    weighed = importance.view(-1, group_size)  # [G, group]
    largest = grouped.abs().amax(dim=2)  # [N, G]
    largest = torch.where(largest < _SMALLEST, 0.0, largest)
    best_error = torch.full(largest.shape, torch.inf, device=weight.device)
    best_scale = (largest / divisors[0]).bfloat16()  # kept where no error is finite

    def offer(scale: Tensor) -> None:
        nonlocal best_error, best_scale
        q = _integers(grouped, _reciprocal(scale), bits)
        off = grouped - q * scale.float()[..., None]
        error = _lane_sum(off * off * weighed)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)

    for divisor in divisors.tolist():
        scale = (largest / divisor).bfloat16()
        offer(scale)
        offer(-scale)
    for _ in range(2):
        q = _integers(grouped, _reciprocal(best_scale), bits)
        above, below = _lane_sum(grouped * q * weighed), _lane_sum(q * q * weighed)
        offer(torch.where(below > 0, above / below, 0.0).bfloat16())
    best_scale = torch.where(largest.isfinite(), best_scale, torch.nan)
    q = _integers(grouped, _reciprocal(best_scale), bits).nan_to_num(0.0).to(torch.int8)
    return q.view(weight.shape), best_scale


def _lane_sum(values: Tensor) -> Tensor:
    """The sum over the last dimension in the order of the compiled code: lanes first, then pairs of them."""
    lanes = values[..., :_LANES].clone()
    for start in range(_LANES, values.shape[-1], _LANES):
        lanes += values[..., start : start + _LANES]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]
