"""The operations ``torch.ops.xverse.*`` on CUDA, as Triton kernels (``gpu/``).

Quantised weights stay in the CPU kernels' tiles, so there is one copy of each on every device, and moving a
module copies bytes. Up to 64 tokens are multiplied straight from the tiles; for more, the weight is
dequantised once and multiplied by cuBLAS. Without Triton the operations run as PyTorch's (``ops.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xverse.gpu import MATRIX_UNITS, capability_of, has_triton
from xverse.kernels import ops
from xverse.kernels.ops import OPERATIONS


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device; make it that of the first argument."""

    @functools.wraps(function)
    def guarded(*arguments: Any) -> Any:
        with torch.cuda.device(arguments[0].device):
            return function(*arguments)

    return guarded


def quant_linear(x: Tensor, tiles: Tensor, outputs: int, bits: int, table_group: int = 0) -> Tensor:
    """``x`` [..., K] times a weight in ``tiles`` → [..., outputs] of the same dtype; activations are not
    quantised. A weight with a table is dequantised by PyTorch's operations."""
    from xverse.kernels.gpu import linear

    if table_group or not x.numel() // x.shape[-1] <= linear.MANY_TOKENS:
        return ops.dequantized_linear(x, tiles, outputs, bits, table_group)
    flat = x.reshape(-1, x.shape[-1])  # [T, K]
    matrix_units = capability_of(x.device) >= MATRIX_UNITS
    y = linear.product(flat.contiguous(), tiles, outputs, bits, matrix_units)
    return ops.dequantized_linear(x, tiles, outputs, bits) if y is None else y.view(*x.shape[:-1], outputs)


def quant_linears(
    x: Tensor, tiles: list[Tensor], outputs: list[int], bits: int, table_group: int = 0
) -> list[Tensor]:
    """``quant_linear`` of one input and several weights."""
    return [quant_linear(x, *weight, bits, table_group) for weight in zip(tiles, outputs, strict=True)]


def dequantize(tiles: Tensor, outputs: int, bits: int, dtype: torch.dtype, table_group: int = 0) -> Tensor:
    """The weight [outputs, K] as ``dtype``, without a table in one launch."""
    from xverse.kernels.gpu import linear

    if table_group:
        return ops.dequantize(tiles, outputs, bits, dtype, table_group)
    return linear.dequantize(tiles.contiguous(), outputs, bits, dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``ops.rms_norm``."""
    from xverse.kernels.gpu import layers

    return layers.rms_norm(x, weight, eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``ops.silu_mul``."""
    from xverse.kernels.gpu import layers

    return layers.silu_mul(gate, up)


def rotate_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """``ops.rotate_``."""
    from xverse.kernels.gpu import layers

    if q.is_contiguous() and k.is_contiguous():
        layers.rotate_(q, k, cos, sin)
    else:
        ops.rotate_plainly(q, k, cos, sin)


def paged_append(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor,
    key_scales: Tensor | None, value_scales: Tensor | None, slots: Tensor,
) -> None:  # fmt: skip
    """``PagedLayer.append``."""
    from xverse.kernels.gpu import attention

    attention.append(k, v, keys, values, key_scales, value_scales, slots)


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor,
    key_scales: Tensor | None, value_scales: Tensor | None, table: Tensor, lengths: Tensor,
) -> Tensor:  # fmt: skip
    """``PagedLayer.attend``."""
    from xverse.kernels.gpu import attention

    return attention.attend(q, keys, values, key_scales, value_scales, table, lengths)


if has_triton():
    for _operation in (
        quant_linear, quant_linears, dequantize, rms_norm, silu_mul, rotate_, paged_append, paged_attention
    ):  # fmt: skip
        OPERATIONS.impl(_operation.__name__, _on_its_device(_operation), "CUDA")
