"""A quantised weight as integers and scales: the result of every method, the content of every format."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xverse.config import UserError

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)  # inputs that share a scale, as the kernels and the stored format take them


@dataclass(frozen=True)
class QuantizedWeight:
    """``weight ≈ q · scale`` with one scale for each output row and group of inputs.

    ``q`` is int8 [N, K] from -2^(bits-1) to 2^(bits-1) - 1 (symmetric: no zero point), ``scales`` bfloat16
    [N, K/group_size]. A scale per row is a group of all K inputs.
    """

    q: Tensor
    scales: Tensor
    bits: int

    def __post_init__(self) -> None:
        assert self.bits in BITS
        assert self.q.dtype == torch.int8, self.q.dtype
        assert self.scales.dtype == torch.bfloat16, self.scales.dtype
        assert self.q.shape[0] == self.scales.shape[0]
        assert self.q.shape[1] % self.scales.shape[1] == 0

    @property
    def group_size(self) -> int:
        return self.q.shape[1] // self.scales.shape[1]

    @property
    def stored_bytes(self) -> int:
        """The size of integers and scales."""
        return self.q.numel() * self.bits // 8 + self.scales.numel() * self.scales.itemsize

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``q · scale``, [N, K] of ``dtype``."""
        grouped = self.q.view(*self.scales.shape, self.group_size).to(dtype)  # [N, G, group]
        return (grouped * self.scales.to(dtype)[..., None]).view(self.q.shape)

    def cpu(self) -> QuantizedWeight:
        return QuantizedWeight(self.q.cpu(), self.scales.cpu(), self.bits)

    def outputs(self, rows: range) -> QuantizedWeight:
        """The weight of the outputs ``rows``."""
        own = slice(rows.start, rows.stop)
        return QuantizedWeight(self.q[own], self.scales[own], self.bits)

    def inputs(self, columns: range) -> QuantizedWeight:
        """The weight of the inputs ``columns``, which are whole groups."""
        group = self.group_size
        assert columns.start % group == columns.stop % group == 0
        scales = self.scales[:, columns.start // group : columns.stop // group]
        return QuantizedWeight(self.q[:, columns.start : columns.stop].contiguous(), scales, self.bits)

    def regrouped(self, group_size: int) -> QuantizedWeight:
        """The same weight with its scales repeated for smaller groups of ``group_size`` inputs."""
        assert self.group_size % group_size == 0
        return QuantizedWeight(
            self.q, self.scales.repeat_interleave(self.group_size // group_size, dim=1), self.bits
        )


def check_bits(bits: int) -> None:
    """Raises UserError for an unsupported number of bits."""
    if bits not in BITS:
        raise UserError(f"bits: {bits} is not supported; 8 or 4")


def check_group_size(group_size: int, *sizes: int) -> None:
    """Raises UserError for a group size that is unsupported or does not divide one of the input ``sizes``."""
    if group_size not in GROUP_SIZES:
        known = ", ".join(map(str, GROUP_SIZES))
        raise UserError(f"group_size: {group_size} is not supported; one of {known}")
    for size in sizes:
        if size % group_size:
            raise UserError(f"group_size: {group_size} does not divide the {size} inputs of a layer")
