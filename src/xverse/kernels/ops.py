"""The kernels of inference as PyTorch operations ``torch.ops.xverse.*``, with shapes for the meta device.

Without the compiled kernels the same operations run in PyTorch: slower, and with activations that are not
quantised.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from xverse.kernels.native import TYPES, call, library
from xverse.kernels.tiles import TILE_ROWS, tile_format, tile_groups, untile
from xverse.model.rope import rotate

_ROWS_AT_ONCE = 2048  # outputs that are dequantised at a time
_DEVICE_ROWS = 32_768  # on devices other than the CPU: all but a head's at once, 256 MB at 4,096 inputs
BF16_TOKENS = 8  # with more tokens PyTorch's matmul is faster

OPERATIONS = torch.library.Library("xverse", "DEF")
OPERATIONS.define("quant_linear(Tensor x, Tensor tiles, int outputs, int bits, int table_group=0) -> Tensor")
OPERATIONS.define(
    "quant_linears(Tensor x, Tensor[] tiles, int[] outputs, int bits, int table_group=0) -> Tensor[]"
)
OPERATIONS.define(
    "dequantize(Tensor tiles, int outputs, int bits, ScalarType dtype, int table_group=0) -> Tensor"
)
OPERATIONS.define("linear_bf16(Tensor x, Tensor weight) -> Tensor")
OPERATIONS.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
OPERATIONS.define("silu_mul(Tensor gate, Tensor up) -> Tensor")
OPERATIONS.define("rotate_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin) -> ()")
_PAGES = "Tensor{} keys, Tensor{} values, Tensor{}? key_scales, Tensor{}? value_scales"
OPERATIONS.define(
    f"paged_append(Tensor k, Tensor v, {_PAGES.format('(a!)', '(b!)', '(c!)', '(d!)')}, Tensor slots) -> ()"
)
OPERATIONS.define(
    f"paged_attention(Tensor q, {_PAGES.format('', '', '', '')}, Tensor table, Tensor lengths) -> Tensor"
)


def is_eager_cpu(x: Tensor) -> bool:
    """Whether functions of this module may be called without PyTorch's dispatcher, which takes as long as a
    small product: ``x`` is a plain tensor on the CPU and nothing is being compiled."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


def quant_linear(x: Tensor, tiles: Tensor, outputs: int, bits: int, table_group: int = 0) -> Tensor:
    """``x`` [..., K], float32 or bfloat16, times a weight in ``tiles`` → [..., outputs] of the same dtype.

    Activations are quantised to int8 with one scale for each token and group of inputs; products are summed
    in int32 within a group and in float32 across groups.
    """
    return quant_linears(x, [tiles], [outputs], bits, table_group)[0]


def quant_linears(
    x: Tensor, tiles: list[Tensor], outputs: list[int], bits: int, table_group: int = 0
) -> list[Tensor]:
    """``quant_linear`` of one input and several weights of the same format and group size."""
    if library() is None or x.dtype not in TYPES:
        return _plain_linears(x, tiles, outputs, bits, table_group)
    inputs, count = x.shape[-1], len(tiles)
    x = x.contiguous()
    y = [x.new_empty((*x.shape[:-1], size)) for size in outputs]
    if x.numel():
        pointers = ctypes.c_void_p * count
        weights = pointers(*[weight.data_ptr() for weight in tiles])
        results = pointers(*[output.data_ptr() for output in y])
        form, group = tile_format(bits, table_group), tile_groups(tiles[0], bits, table_group)[1]
        call(
            "xv_quant_linear", x, weights, results, (ctypes.c_int64 * count)(*outputs), count, TYPES[x.dtype],
            x.numel() // inputs, inputs, form, group,
        )  # fmt: skip
    return y


def dequantized_linear(x: Tensor, tiles: Tensor, outputs: int, bits: int, table_group: int = 0) -> Tensor:
    """``quant_linear`` in PyTorch's operations, on any device, differentiable in ``x``; activations are not
    quantised. The weight is dequantised part by part, and again in the backward pass, which keeps only the
    quantised weight."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _DequantizedLinear.apply(x, tiles, outputs, bits, table_group)


def dequantized_parts(
    tiles: Tensor, outputs: int, bits: int, dtype: torch.dtype, table_group: int = 0
) -> Iterator[Tensor]:
    """The rows of a weight in order, as parts [rows, inputs] of ``dtype``; each part may overwrite the one
    before."""
    groups, group = tile_groups(tiles, bits, table_group)
    inputs = groups * group
    buffer: Tensor | None = None
    done = 0
    at_once = _ROWS_AT_ONCE if tiles.device.type == "cpu" else _DEVICE_ROWS
    for part in tiles.split(at_once // TILE_ROWS):
        rows = min(len(part) * TILE_ROWS, outputs - done)
        done += rows
        if library() is None or dtype not in TYPES or not is_eager_cpu(part):
            yield torch.ops.xverse.dequantize(part, rows, bits, dtype, table_group)
            continue
        if buffer is None:
            buffer = torch.empty(rows, inputs, dtype=dtype)
        form = tile_format(bits, table_group)
        call("xv_dequantize", part, buffer, TYPES[dtype], rows, inputs, form, group)
        yield buffer[:rows]


class _DequantizedLinear(torch.autograd.Function):
    """``x`` [..., K] of any float dtype → [..., outputs]; the gradient [..., outputs] → [..., K]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tiles: Tensor, outputs: int, bits: int, table_group: int) -> Tensor:
        ctx.tiles, ctx.outputs, ctx.format = tiles, outputs, (bits, table_group)
        parts = [linear(x, part) for part in dequantized_parts(tiles, outputs, bits, x.dtype, table_group)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = output_grads
        total: Tensor | None = None
        start = 0
        bits, table_group = ctx.format
        for part in dequantized_parts(ctx.tiles, ctx.outputs, bits, grad.dtype, table_group):
            piece = grad[..., start : start + len(part)] @ part
            total = piece if total is None else total.add_(piece)
            start += len(part)
        assert total is not None
        return total, None, None, None, None


def dequantize(tiles: Tensor, outputs: int, bits: int, dtype: torch.dtype, table_group: int = 0) -> Tensor:
    """The weight [outputs, K] in ``tiles`` as ``dtype``, by PyTorch's operations."""
    return untile(tiles, outputs, bits, table_group).dequantize(dtype)


def linear_bf16(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` bfloat16 [..., K] times the transpose of ``weight`` bfloat16 [N, K] → [..., N]; faster than
    PyTorch's matmul for up to 8 tokens."""
    tokens = x.numel() // x.shape[-1]
    if library() is None or not 0 < tokens <= BF16_TOKENS or not weight.is_contiguous():
        return linear(x, weight)
    return _linear(x, weight)


def invariant_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` [..., K] times the transpose of ``weight`` [N, K] → [..., N], both float32 or both bfloat16, in
    the kernels whatever the number of tokens: the bits of a token depend on that token alone. PyTorch's
    products divide their sums by the number of tokens and of threads."""
    usable = x.dtype in TYPES and x.dtype == weight.dtype and weight.is_contiguous() and x.numel()
    return _linear(x, weight) if library() is not None and usable else linear(x, weight)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    outputs, inputs = weight.shape
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], outputs))
    call("xv_linear", x, weight, y, TYPES[x.dtype], x.numel() // inputs, outputs, inputs)
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of ``x`` [..., D] times ``weight`` [D] → x's shape and dtype; float32 inside, rounded once."""
    if library() is None or x.dtype not in TYPES or weight.dtype not in TYPES:
        return _plain_norm(x, weight, eps)
    x = x.contiguous()
    y = torch.empty_like(x)
    size = x.shape[-1]
    call("xv_rms_norm", x, weight, y, TYPES[x.dtype], TYPES[weight.dtype], x.numel() // size, size, eps)
    return y


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` of two tensors [...] of one dtype; float32 inside, rounded once."""
    if library() is None or gate.dtype not in TYPES:
        return torch.nn.functional.silu(gate) * up
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    call("xv_silu_mul", gate, up, y, TYPES[gate.dtype], y.numel())
    return y


def rotate_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary embedding of queries [B, T, H, head_dim] and keys [B, T, KV, head_dim], in place, by tables
    [B, 1, T, head_dim]; all of one dtype."""
    if library() is None or q.dtype not in TYPES or not (q.is_contiguous() and k.is_contiguous()):
        rotate_plainly(q, k, cos, sin)
        return
    batch, length, heads, head_dim = q.shape
    shape = (batch, 1, length, head_dim)
    cos, sin = cos.expand(shape).contiguous(), sin.expand(shape).contiguous()
    call("xv_rotate", q, k, cos, sin, TYPES[q.dtype], batch * length, heads, k.shape[2], head_dim)


def rotate_plainly(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """``rotate_`` by PyTorch's operations."""
    for x in (q, k):
        x.copy_(rotate(x.transpose(1, 2), cos, sin).transpose(1, 2))


def advise_huge_pages(tensor: Tensor) -> None:
    """Request huge pages for a tensor on the CPU that has not been written yet: faster to fill and to read
    where the system has them available."""
    kernels = library()
    if kernels is not None and tensor.device.type == "cpu":
        kernels.xv_use_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def _shape_quant_linear(x: Tensor, tiles: Tensor, outputs: int, bits: int, table_group: int = 0) -> Tensor:
    groups, group = tile_groups(tiles, bits, table_group)
    assert groups * group == x.shape[-1]
    return x.new_empty((*x.shape[:-1], outputs))


def _shape_quant_linears(
    x: Tensor, tiles: list[Tensor], outputs: list[int], bits: int, table_group: int = 0
) -> list[Tensor]:
    return [_shape_quant_linear(x, *weight, bits, table_group) for weight in zip(tiles, outputs, strict=True)]


def _shape_dequantize(
    tiles: Tensor, outputs: int, bits: int, dtype: torch.dtype, table_group: int = 0
) -> Tensor:
    groups, group = tile_groups(tiles, bits, table_group)
    return tiles.new_empty((outputs, groups * group), dtype=dtype)


def _plain_linears(
    x: Tensor, tiles: list[Tensor], outputs: list[int], bits: int, table_group: int = 0
) -> list[Tensor]:
    return [dequantized_linear(x, *weight, bits, table_group) for weight in zip(tiles, outputs, strict=True)]


def _plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


# On every device, so that no device lacks an operation (MPS, XPU, NPU, CUDA without Triton); ``cuda.py`` and
# the CPU's kernels replace them.
for _name, _function in (
    ("quant_linear", dequantized_linear),
    ("quant_linears", _plain_linears),
    ("dequantize", dequantize),
    ("linear_bf16", linear),
    ("rms_norm", _plain_norm),
    ("silu_mul", lambda gate, up: torch.nn.functional.silu(gate) * up),
    ("rotate_", rotate_plainly),
):
    OPERATIONS.impl(_name, _function, "CompositeExplicitAutograd")
for _operation in (quant_linear, quant_linears, linear_bf16, rms_norm, silu_mul, rotate_):
    OPERATIONS.impl(_operation.__name__, _operation, "CPU")
for _name, _shapes in (
    ("quant_linear", _shape_quant_linear),
    ("quant_linears", _shape_quant_linears),
    ("dequantize", _shape_dequantize),
    ("linear_bf16", lambda x, weight: x.new_empty((*x.shape[:-1], weight.shape[0]))),
    ("rms_norm", lambda x, weight, eps: torch.empty_like(x)),
    ("silu_mul", lambda gate, up: torch.empty_like(gate)),
    ("rotate_", lambda q, k, cos, sin: None),
    ("paged_append", lambda *arguments: None),
    ("paged_attention", lambda q, *pages: q.new_empty(q.shape)),
):
    torch.library.register_fake(f"xverse::{_name}", _shapes, lib=OPERATIONS)
