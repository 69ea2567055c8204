"""The operations ``torch.ops.xverse.*`` on CUDA, as Triton kernels (``gpu/``).

Quantised weights stay in the CPU kernels' tiles, so there is one copy of each on every device, and moving a
module copies bytes. Up to 64 tokens are multiplied straight from the tiles; for more, the weight is
dequantised once and multiplied by cuBLAS. Without Triton the operations run as PyTorch's (``ops.py``).
"""

from __future__ import annotations

import functools
import importlib
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


def rotate_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """``ops.rotate_``."""
    from xverse.kernels.gpu import layers

    if q.is_contiguous() and k.is_contiguous():
        layers.rotate_(q, k, cos, sin)
    else:
        ops.rotate_plainly(q, k, cos, sin)


def _forwarded(module: str, name: str) -> Callable[..., Any]:
    """A function of ``gpu/``, imported when it is first called."""

    def forward(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"xverse.kernels.gpu.{module}"), name)(*arguments)

    return forward


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "quant_linear": quant_linear,
    "quant_linears": quant_linears,
    "dequantize": dequantize,
    "rms_norm": _forwarded("layers", "rms_norm"),
    "silu_mul": _forwarded("layers", "silu_mul"),
    "rotate_": rotate_,
    "paged_append": _forwarded("attention", "append"),
    "paged_attention": _forwarded("attention", "attend"),
}
if has_triton():
    for _name, _function in _FUNCTIONS.items():
        OPERATIONS.impl(_name, _on_its_device(_function), "CUDA")
