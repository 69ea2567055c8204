"""GPTQ checkpoints in AutoGPTQ's layout, converted losslessly to symmetric integers.

A linear [N, K] of ``b`` bits in groups of ``g`` inputs has ``qweight`` int32 [K·b/32, N] and ``qzeros`` int32
[K/g, N·b/32], both with the lowest index in the lowest bits, ``scales`` [K/g, N] and ``g_idx`` int32 [K], the
group of each input: w[n, k] = scales[g_idx[k], n] · (qweight[k, n] - z[g_idx[k], n]). Files of the format
``gptq`` store z - 1, those of ``gptq_v2`` store z.

A zero point in the middle of the range is symmetric quantisation with the same bits. With any other, 4 bits
minus the zero point range from -15 to 15, which 8 bits hold with the same scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xverse.config import UserError
from xverse.formats.compressed import StoredRows, check_kernel_group, checked_scales
from xverse.formats.weights import TensorFiles, dtype_name
from xverse.kernels.tiles import kernel_group_size, to_rows
from xverse.kernels.weight import INTEGER_BITS, QuantizedWeight

_FORMATS = {"gptq": 1, "gptq_v2": 0}  # added to a stored zero point


@dataclass(frozen=True)
class GPTQScheme:
    """``group_size`` None: one group of all inputs. ``zero_offset`` is added to stored zero points."""

    bits: int
    group_size: int | None
    zero_offset: int
    marker = "qweight"
    suffixes = ("qweight", "qzeros", "scales", "g_idx")

    def read(self, files: TensorFiles, name: str, shape: tuple[int, int]) -> StoredRows:
        """The matrix ``name`` of ``shape`` [N, K]; its zero points decide the bits of the result.

        Raises UserError for a tensor that is missing or has the wrong shape or dtype, scales that are not
        finite, zero points that 8 bits cannot hold, and groups of unequal size.
        """
        outputs, inputs = shape
        per_word = 32 // self.bits
        group = self.group_size or inputs
        if inputs % group or outputs % per_word:
            raise UserError(f"{name}: groups of {group} do not divide its {inputs} inputs")
        groups = inputs // group
        check_kernel_group(name, group)
        qweight = _tensor(files, f"{name}.qweight", (inputs // per_word, outputs))
        qzeros = _tensor(files, f"{name}.qzeros", (groups, outputs // per_word))
        scales = _tensor(files, f"{name}.scales", (groups, outputs), floating=True)
        scales = checked_scales(f"{name}.scales", scales)  # [G, N]
        zeros = _unpacked(qzeros, self.bits).reshape(groups, outputs)  # [G, N]
        zeros = (zeros + self.zero_offset) & ((1 << self.bits) - 1)
        order, group_of = self._groups(files, name, inputs, groups)
        symmetric = bool((zeros == 1 << (self.bits - 1)).all())
        scales = scales.T.contiguous()
        if symmetric and order is None:  # the bytes that to_rows would write
            return StoredRows(qweight.T.contiguous().view(torch.uint8), scales, self.bits)
        values = _unpacked(qweight, self.bits)  # [K/per_word, N, per_word]
        values = values.transpose(1, 2).reshape(inputs, outputs)  # [K, N]
        q = (values - zeros[group_of]).T  # [N, K]
        bits = self.bits if symmetric else 8
        if q.min() < -(1 << (bits - 1)) or q.max() >= 1 << (bits - 1):
            raise UserError(f"{name}: weights of 8 bits with such zero points are not supported")
        if order is not None:
            q = q[:, order]
        weight = QuantizedWeight(q.to(torch.int8).contiguous(), scales, bits)
        return StoredRows(to_rows(weight), scales, bits, order)

    def _groups(
        self, files: TensorFiles, name: str, inputs: int, groups: int
    ) -> tuple[Tensor | None, Tensor]:
        """The order that makes groups contiguous (None: they are), and each input's group, int64 [K]."""
        plain = torch.arange(groups).repeat_interleave(inputs // groups)
        if f"{name}.g_idx" not in files:
            return None, plain
        group_of = _tensor(files, f"{name}.g_idx", (inputs,)).long()
        if torch.equal(group_of, plain):
            return None, plain
        if not torch.equal(group_of.sort().values, plain):
            raise UserError(f"{name}.g_idx: its groups are not {groups} of {inputs // groups} inputs each")
        return group_of.argsort(stable=True), group_of


def read_gptq_scheme(values: Mapping[str, Any], where: str | Path) -> GPTQScheme:
    """The scheme of a ``quantization_config`` or of AutoGPTQ's ``quantize_config.json``.

    Raises UserError for bits other than 4 and 8 and for another format of the checkpoint.
    """
    bits = values.get("bits", values.get("w_bit"))
    if bits not in INTEGER_BITS:
        raise UserError(f"{where}: gptq with bits = {bits} is not supported, only 4 and 8")
    size = values.get("group_size", -1)
    if not isinstance(size, int) or (size > 0 and not kernel_group_size(size)) or size == 0:
        raise UserError(f"{where}: gptq with group_size = {size} is not supported, only multiples of 32")
    kind = values.get("checkpoint_format") or "gptq"
    if kind not in _FORMATS or values.get("is_marlin_format"):
        kind = "marlin" if values.get("is_marlin_format") else kind
        raise UserError(f"{where}: gptq in the format '{kind}' is not supported, only gptq and gptq_v2")
    return GPTQScheme(bits, size if size > 0 else None, _FORMATS[kind])


def _tensor(files: TensorFiles, name: str, shape: tuple[int, ...], floating: bool = False) -> Tensor:
    if name not in files:
        raise UserError(f"{name} is missing")
    tensor = files.get(name)
    valid = tensor.is_floating_point() if floating else tensor.dtype == torch.int32
    if not valid or tensor.shape != shape:
        stored = f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
        raise UserError(f"{name} is {stored}, not {'floats' if floating else 'int32'} {list(shape)}")
    return tensor


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 [...] → the values in each word, int16 [..., 32/bits]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (words[..., None] >> shifts & ((1 << bits) - 1)).to(torch.int16)
