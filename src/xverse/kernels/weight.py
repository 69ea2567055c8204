"""A quantised weight as integers and scales: the result of every method, the content of every format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xverse.config import UserError

BITS = (2, 3, 4, 8)
INTEGER_BITS = (4, 8)  # of the formats that other programs share
GROUP_SIZES = (32, 64, 128)  # inputs that share a scale, as the kernels and the stored format take them
# Entries that leave the smallest squared error of normally distributed weights in groups of 64, each with its
# best scale. A range of at most 127 saves AVX2 an instruction a product.
TABLES: dict[int, tuple[int, ...]] = {
    2: (-71, -24, 13, 56),
    3: (-70, -42, -24, -9, 5, 19, 35, 57),
    4: (-69, -53, -42, -33, -25, -18, -11, -5, 1, 7, 13, 19, 27, 35, 45, 58),
}


@dataclass(frozen=True)
class QuantizedWeight:
    """``weight ≈ value · scale`` with one scale for each output row and group of inputs.

    ``q`` is int8 [N, K] from -2^(bits-1) to 2^(bits-1) - 1 (symmetric: no zero point), ``scales`` bfloat16
    [N, K/group_size]. A scale per row is a group of all K inputs. The values are ``q`` itself or, with up to
    4 bits and a ``table`` int8 [2^bits] in ascending order, ``table[q + 2^(bits-1)]``. ``centres`` bfloat16
    [C, K] are added to the rows: to each the one of its index in ``nearest`` uint8 [N].
    """

    q: Tensor
    scales: Tensor
    bits: int
    table: Tensor | None = None
    centres: Tensor | None = None
    nearest: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.bits in BITS
        assert self.q.dtype == torch.int8, self.q.dtype
        assert self.scales.dtype == torch.bfloat16, self.scales.dtype
        assert self.q.shape[0] == self.scales.shape[0]
        assert self.q.shape[1] % self.scales.shape[1] == 0
        if self.table is not None:
            assert self.bits <= 4
            assert self.table.dtype == torch.int8
            assert self.table.shape == (1 << self.bits,)
        if self.centres is not None and self.nearest is not None:
            assert (self.centres.dtype, self.nearest.dtype) == (torch.bfloat16, torch.uint8)

    @property
    def group_size(self) -> int:
        return self.q.shape[1] // self.scales.shape[1]

    @property
    def stored_bytes(self) -> int:
        """The size of integers, scales, table and centres."""
        others = sum(part.nbytes for name, part in self._tensors().items() if name != "q")
        return self.q.numel() * self.bits // 8 + others

    @property
    def values(self) -> Tensor:
        """What the scales multiply, int8 [N, K]."""
        if self.table is None:
            return self.q
        return self.table[self.q.int() + (1 << (self.bits - 1))]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``value · scale + centre``, [N, K] of ``dtype``."""
        grouped = self.values.view(*self.scales.shape, self.group_size).to(dtype)  # [N, G, group]
        plain = (grouped * self.scales.to(dtype)[..., None]).view(self.q.shape)
        return add_centres(plain, self.centres, self.nearest)

    def cpu(self) -> QuantizedWeight:
        return replace(self, **{name: part.cpu() for name, part in self._tensors().items()})

    def _tensors(self) -> dict[str, Any]:
        return {name: part for name, part in vars(self).items() if isinstance(part, Tensor)}

    def outputs(self, rows: range) -> QuantizedWeight:
        """The weight of the outputs ``rows``."""
        own = slice(rows.start, rows.stop)
        nearest = None if self.nearest is None else self.nearest[own]
        return replace(self, q=self.q[own], scales=self.scales[own], nearest=nearest)

    def inputs(self, columns: range) -> QuantizedWeight:
        """The weight of the inputs ``columns``, which are whole groups."""
        group = self.group_size
        assert columns.start % group == columns.stop % group == 0
        scales = self.scales[:, columns.start // group : columns.stop // group]
        own = self.q[:, columns.start : columns.stop].contiguous()
        centres = None if self.centres is None else self.centres[:, columns.start : columns.stop]
        return replace(self, q=own, scales=scales, centres=centres)

    def regrouped(self, group_size: int) -> QuantizedWeight:
        """The same weight with its scales repeated for smaller groups of ``group_size`` inputs."""
        assert self.group_size % group_size == 0
        scales = self.scales.repeat_interleave(self.group_size // group_size, dim=1)
        return replace(self, scales=scales)


def add_centres(weight: Tensor, centres: Tensor | None, nearest: Tensor | None) -> Tensor:
    """``weight`` [N, K] with each row's centre added, if there are any."""
    if centres is None or nearest is None:
        return weight
    return weight + centres.to(weight.dtype)[nearest.long()]


def table_of(bits: int) -> Tensor | None:
    """The entries of TABLES for weights of ``bits``, int8 [2^bits]; None if they are integers only."""
    return torch.tensor(TABLES[bits], dtype=torch.int8) if bits in TABLES else None


def check_bits(bits: int) -> None:
    """Raises UserError for an unsupported number of bits."""
    if bits not in BITS:
        raise UserError(f"bits: {bits} is not supported; 8, 4, 3 or 2")


def check_group_size(group_size: int, *sizes: int) -> None:
    """Raises UserError for a group size that is unsupported or does not divide one of the input ``sizes``."""
    if group_size not in GROUP_SIZES:
        known = ", ".join(map(str, GROUP_SIZES))
        raise UserError(f"group_size: {group_size} is not supported; one of {known}")
    for size in sizes:
        if size % group_size:
            raise UserError(f"group_size: {group_size} does not divide the {size} inputs of a layer")
