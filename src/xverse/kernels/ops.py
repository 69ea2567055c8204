"""The kernels as PyTorch operations ``torch.ops.xverse.*``, with shapes for the meta device.

Where the compiled kernels are missing, the same operations in PyTorch: slower, and with activations that are
not quantised.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from xverse.kernels.native import library
from xverse.kernels.tiles import TILE_ROWS, tile_group_size, untile
from xverse.model.rope import rotate

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_ROWS_AT_ONCE = 2048  # outputs that exist dequantised at a time
BF16_TOKENS = 8  # above them PyTorch's own matmul is the faster one

_library = torch.library.Library("xverse", "DEF")
_library.define("quant_linear(Tensor x, Tensor tiles, int outputs, int bits) -> Tensor")
_library.define("quant_linears(Tensor x, Tensor[] tiles, int[] outputs, int bits) -> Tensor[]")
_library.define("linear_bf16(Tensor x, Tensor weight) -> Tensor")
_library.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
_library.define("silu_mul(Tensor gate, Tensor up) -> Tensor")
_library.define("rotate_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin) -> ()")


def direct(x: Tensor) -> bool:
    """Whether our functions may be called as they are: eager, on the CPU. The dispatcher's way to a Python
    function takes as long as a small product; compilers and tensors that are none need it."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


def quant_linear(x: Tensor, tiles: Tensor, outputs: int, bits: int) -> Tensor:
    """``x`` [..., K], float32 or bfloat16, times a tiled weight → [..., outputs] of the same type.

    Activations are quantised to int8 with one scale for each token and group of inputs; products are summed
    in int32 within a group and in float32 across groups.
    """
    return quant_linears(x, [tiles], [outputs], bits)[0]


def quant_linears(x: Tensor, tiles: list[Tensor], outputs: list[int], bits: int) -> list[Tensor]:
    """``quant_linear`` of one input and several weights of the same number of bits and group size."""
    kernels = library()
    kind = _TYPES.get(x.dtype)
    if kernels is None or kind is None:
        return [dequantized_linear(x, *each, bits) for each in zip(tiles, outputs, strict=True)]
    inputs, count = x.shape[-1], len(tiles)
    x = x.contiguous()
    y = [x.new_empty((*x.shape[:-1], each)) for each in outputs]
    if x.numel():
        pointers = ctypes.c_void_p * count
        kernels.xv_quant_linear(
            x.data_ptr(),
            pointers(*[each.data_ptr() for each in tiles]),
            pointers(*[each.data_ptr() for each in y]),
            (ctypes.c_int64 * count)(*outputs),
            count, kind, x.numel() // inputs, inputs, bits, tile_group_size(tiles[0], bits),
            torch.get_num_threads(),
        )  # fmt: skip
    return y


def dequantized_linear(x: Tensor, tiles: Tensor, outputs: int, bits: int) -> Tensor:
    """The same with PyTorch's operations on any device: the weight is dequantised part by part. Gradients
    reach ``x``; they keep the quantised weight alone, and dequantise it once more."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _DequantizedLinear.apply(x, tiles, outputs, bits)


def dequantized_parts(tiles: Tensor, outputs: int, bits: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The weight [rows, inputs] in the order of its outputs, some rows at a time: each part may be
    overwritten by the next."""
    kernels, kind = library(), _TYPES.get(dtype)
    group = tile_group_size(tiles, bits)
    inputs = tiles.shape[1] * group
    buffer: Tensor | None = None
    done = 0
    for part in tiles.split(_ROWS_AT_ONCE // TILE_ROWS):
        rows = min(len(part) * TILE_ROWS, outputs - done)
        done += rows
        if kernels is None or kind is None or not direct(part):
            yield untile(part, rows, bits).dequantize(dtype)
            continue
        if buffer is None:
            buffer = torch.empty(rows, inputs, dtype=dtype)
        kernels.xv_dequantize(
            part.data_ptr(), buffer.data_ptr(), kind, rows, inputs, bits, group, torch.get_num_threads()
        )
        yield buffer[:rows]


class _DequantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tiles: Tensor, outputs: int, bits: int) -> Tensor:
        ctx.tiles, ctx.outputs, ctx.bits = tiles, outputs, bits
        y = x.new_empty(*x.shape[:-1], outputs)
        start = 0
        for part in dequantized_parts(tiles, outputs, bits, x.dtype):
            y[..., start : start + len(part)] = linear(x, part)
            start += len(part)
        return y

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = output_grads
        total: Tensor | None = None
        start = 0
        for part in dequantized_parts(ctx.tiles, ctx.outputs, ctx.bits, grad.dtype):
            piece = grad[..., start : start + len(part)] @ part
            total = piece if total is None else total.add_(piece)
            start += len(part)
        assert total is not None
        return total, None, None, None


def linear_bf16(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` bfloat16 [..., K] times ``weight`` bfloat16 [N, K] transposed, faster for up to 8 tokens."""
    kernels = library()
    inputs = x.shape[-1]
    tokens = x.numel() // inputs
    if kernels is None or not 0 < tokens <= BF16_TOKENS or not weight.is_contiguous():
        return linear(x, weight)
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    kernels.xv_linear_bf16(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), tokens, weight.shape[0], inputs,
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of ``x`` [..., D], multiplied by the weight in float32 and rounded once."""
    kernels = library()
    kind, weight_kind = _TYPES.get(x.dtype), _TYPES.get(weight.dtype)
    if kernels is None or kind is None or weight_kind is None:
        return torch.nn.functional.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
    x = x.contiguous()
    y = torch.empty_like(x)
    size = x.shape[-1]
    kernels.xv_rms_norm(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), kind, weight_kind, x.numel() // size, size, eps,
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, in float32 inside and rounded once."""
    kernels = library()
    kind = _TYPES.get(gate.dtype)
    if kernels is None or kind is None:
        return torch.nn.functional.silu(gate) * up
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    kernels.xv_silu_mul(
        gate.data_ptr(), up.data_ptr(), y.data_ptr(), kind, y.numel(), torch.get_num_threads()
    )
    return y


def rotate_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate queries and keys [B, T, H, head_dim] in place, by tables [B, 1, T, head_dim] of their type."""
    kernels = library()
    kind = _TYPES.get(q.dtype)
    if kernels is None or kind is None or not (q.is_contiguous() and k.is_contiguous()):
        for x in (q, k):
            x.copy_(rotate(x.transpose(1, 2), cos, sin).transpose(1, 2))
        return
    batch, length, heads, head_dim = q.shape
    shape = (batch, 1, length, head_dim)
    cos, sin = cos.expand(shape).contiguous(), sin.expand(shape).contiguous()
    kernels.xv_rotate(
        q.data_ptr(), k.data_ptr(), cos.data_ptr(), sin.data_ptr(), kind, batch * length, heads, head_dim,
        torch.get_num_threads(),
    )  # fmt: skip


def advise_huge_pages(tensor: Tensor) -> None:
    """Ask for large pages for a tensor on the CPU that is not written yet: faster to fill and to read, where
    the system has them at hand."""
    kernels = library()
    if kernels is not None and tensor.device.type == "cpu":
        kernels.xv_use_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def _shape_quant_linear(x: Tensor, tiles: Tensor, outputs: int, bits: int) -> Tensor:
    assert tiles.shape[1] * tile_group_size(tiles, bits) == x.shape[-1]
    return x.new_empty((*x.shape[:-1], outputs))


def _shape_quant_linears(x: Tensor, tiles: list[Tensor], outputs: list[int], bits: int) -> list[Tensor]:
    return [_shape_quant_linear(x, *each, bits) for each in zip(tiles, outputs, strict=True)]


def _shape_linear_bf16(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


for _operation in (quant_linear, quant_linears, linear_bf16, rms_norm, silu_mul, rotate_):
    _library.impl(_operation.__name__, _operation, "CPU")
for _name, _shapes in (
    ("quant_linear", _shape_quant_linear),
    ("quant_linears", _shape_quant_linears),
    ("linear_bf16", _shape_linear_bf16),
    ("rms_norm", lambda x, weight, eps: torch.empty_like(x)),
    ("silu_mul", lambda gate, up: torch.empty_like(gate)),
    ("rotate_", lambda q, k, cos, sin: None),
):
    torch.library.register_fake(f"xverse::{_name}", _shapes, lib=_library)
