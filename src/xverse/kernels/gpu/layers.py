"""The small operations of a layer on a GPU as Triton kernels: each reads and writes its tensors once, in one
launch. Float32 inside, rounded once, like the CPU kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def norm_rows(x, weight, y, eps, D: tl.constexpr, WIDTH: tl.constexpr):
    """RMSNorm of one row of ``x`` [T, D]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    value = tl.load(x + row * D + column, mask=column < D, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    root = tl.sqrt(tl.sum(value * value, axis=0) / D + eps)
    tl.store(y + row * D + column, (value / root * scale).to(y.dtype.element_ty), mask=column < D)


@triton.jit
def gate_values(gate, up, y, count, BLOCK: tl.constexpr):
    """silu(gate) · up."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(y + at, (g / (1.0 + tl.exp(-g)) * u).to(y.dtype.element_ty), mask=at < count)


@triton.jit
def rotate_heads(q, k, cos, sin, heads, key_heads, table_rows, D: tl.constexpr, WIDTH: tl.constexpr):
    """One token's head of ``q`` [N, H, D] and of ``k`` [N, KV, D], in place, by tables [table_rows, D]."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = tl.arange(0, WIDTH)
    inside = half < D // 2
    at = token % table_rows * D + half
    cos_low = tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + at + D // 2, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + at + D // 2, mask=inside, other=0.0).to(tl.float32)
    for place in tl.static_range(2):
        pointer = q if place == 0 else k
        count = heads if place == 0 else key_heads
        to = (token * count + head) * D + half
        within = half < tl.where(head < count, D // 2, 0)
        low = tl.load(pointer + to, mask=within, other=0.0).to(tl.float32)
        high = tl.load(pointer + to + D // 2, mask=within, other=0.0).to(tl.float32)
        first, second = low * cos_low - high * sin_low, high * cos_high + low * sin_high
        tl.store(pointer + to, first.to(q.dtype.element_ty), mask=within)
        tl.store(pointer + to + D // 2, second.to(q.dtype.element_ty), mask=within)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``ops.rms_norm``."""
    x = x.contiguous()
    y = torch.empty_like(x)
    size = x.shape[-1]
    width = triton.next_power_of_2(size)
    norm_rows[(x.numel() // size,)](
        x, weight, y, eps, D=size, WIDTH=width, num_warps=8 if width > 1024 else 4
    )
    return y


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``ops.silu_mul``."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    gate_values[(triton.cdiv(y.numel(), 1024),)](gate, up, y, y.numel(), BLOCK=1024, num_warps=4)
    return y


def rotate_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """``ops.rotate_`` of contiguous q [B, T, H, D], k [B, T, KV, D] and tables [B or 1, 1, T, D]."""
    batch, length, heads, size = q.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    width = triton.next_power_of_2(size // 2)
    grid = (batch * length, heads)
    rotate_heads[grid](
        q, k, cos, sin, heads, k.shape[2], cos.numel() // size, D=size, WIDTH=width, num_warps=1
    )
