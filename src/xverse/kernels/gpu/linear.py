"""Products with weights in ``tiles.py``'s layout, as Triton kernels: the same bytes serve CPU and GPU.

A tile holds 32 outputs of one group: 16 words of scales, then for every four inputs one 32-bit word per
output (8 bits) or per pair of outputs 16 apart (4 bits: the first in the low nibbles).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xverse.kernels.tiles import SCALE_BYTES, tile_groups

SCALE_WORDS = tl.constexpr(SCALE_BYTES // 4)
FEW_TOKENS = 4  # up to here a product in float32 units is bound by memory
MANY_TOKENS = 64  # beyond, dequantising once and a plain product are faster


@triton.jit
def _values(word, shift, BITS: tl.constexpr):
    """The values at ``shift`` of 32-bit words, as floats offset by 384 (8 bits) or 24 (4 bits).

    The bits are placed into a float's mantissa, since conversions run at a quarter of other operations' rate.
    """
    if BITS == 8:
        bits = (((word >> shift) & 255) << 15) | 0x43800000
    else:
        bits = (((word >> shift) & 15) << 19) | 0x41800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def few_tokens(
    x, words, scales, y, count, K, N, groups, tile_words,
    T: tl.constexpr, BITS: tl.constexpr, QUADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``x`` [count, K], count ≤ T, times one tile of 32 outputs → ``y`` [count, N], in float32; ``BLOCK``
    groups of ``QUADS`` · 4 inputs at a time."""
    tile = tl.program_id(0).to(tl.int64) * groups
    LANES: tl.constexpr = 4 * BITS
    OFFSET: tl.constexpr = 384.0 if BITS == 8 else 24.0
    block = tl.arange(0, BLOCK)
    quad = tl.arange(0, QUADS)
    lane = tl.arange(0, LANES)
    token = tl.arange(0, T)
    low = tl.zeros((T, LANES), tl.float32)
    high = tl.zeros((T, LANES), tl.float32)
    for start in range(0, groups, BLOCK):
        group = start + block  # [BLOCK]
        inside = group < groups
        base = (tile + group) * tile_words
        at = base[:, None, None] + SCALE_WORDS + quad[None, :, None] * LANES + lane[None, None, :]
        word = tl.load(words + at, mask=inside[:, None, None], other=0)  # [BLOCK, QUADS, LANES]
        scale = tl.load(scales + 2 * base[:, None] + lane[None, :], mask=inside[:, None], other=0.0)
        if BITS == 4:
            scale_high = tl.load(
                scales + 2 * base[:, None] + 16 + lane[None, :], mask=inside[:, None], other=0.0
            )
        column = (group[:, None] * QUADS + quad[None, :]) * 4  # [BLOCK, QUADS]
        for t in tl.static_range(T):
            from_row = x + tl.minimum(t, count - 1) * K
            total = tl.zeros((BLOCK, QUADS), tl.float32)
            part = tl.zeros((BLOCK, QUADS, LANES), tl.float32)
            part_high = tl.zeros((BLOCK, QUADS, LANES), tl.float32)
            for j in tl.static_range(4):
                value = tl.load(from_row + column + j, mask=inside[:, None], other=0.0).to(tl.float32)
                total += value
                part += _values(word, 8 * j, BITS) * value[:, :, None]
                if BITS == 4:
                    part_high += _values(word, 8 * j + 4, BITS) * value[:, :, None]
            part -= OFFSET * total[:, :, None]
            here = (token == t)[:, None]
            low += tl.where(here, tl.sum(tl.sum(part, axis=1) * scale.to(tl.float32), axis=0)[None, :], 0.0)
            if BITS == 4:
                part_high -= OFFSET * total[:, :, None]
                sums = tl.sum(tl.sum(part_high, axis=1) * scale_high.to(tl.float32), axis=0)
                high += tl.where(here, sums[None, :], 0.0)
    output = tl.program_id(0) * 32 + lane[None, :]
    to = y + token[:, None] * N + output
    tl.store(to, low.to(y.dtype.element_ty), mask=(output < N) & (token < count)[:, None])
    if BITS == 4:
        tl.store(to + 16, high.to(y.dtype.element_ty), mask=(output + 16 < N) & (token < count)[:, None])


@triton.jit
def many_tokens(
    x, words, scales, y, count, K, N, groups, tile_words,
    BITS: tl.constexpr, QUADS: tl.constexpr, TOKENS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """``TOKENS`` rows of ``x`` [count, K] times ``OUTPUTS`` outputs, by matrix units; sums in float32, scaled
    group by group; ``y`` [count, N]."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    quad = tl.arange(0, QUADS)
    LANES: tl.constexpr = 4 * BITS
    OFFSET: tl.constexpr = 384.0 if BITS == 8 else 24.0
    lane = output % 32
    inside = output < (N + 31) // 32 * 32
    tile = (output // 32).to(tl.int64) * groups
    total = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for group in range(groups):
        base = (tile + group) * tile_words  # [OUTPUTS]
        at = base[None, :] + SCALE_WORDS + quad[:, None] * LANES + (lane % LANES)[None, :]
        word = tl.load(words + at, mask=inside[None, :], other=0)  # [QUADS, OUTPUTS]
        scale = tl.load(scales + 2 * base + lane, mask=inside, other=0.0).to(tl.float32)
        if BITS == 4:
            word = word >> (4 * (lane // 16))[None, :]
        part = tl.zeros((TOKENS, OUTPUTS), tl.float32)
        for j in tl.static_range(4):
            column = (group * QUADS + quad) * 4 + j
            value = tl.load(x + row[:, None] * K + column[None, :], mask=row[:, None] < count, other=0.0)
            weight = (_values(word, 8 * j, BITS) - OFFSET).to(value.dtype)  # exact
            part = tl.dot(value, weight, part)
        total += part * scale[None, :]
    to = y + row[:, None] * N + output[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=(row[:, None] < count) & (output[None, :] < N))


@triton.jit
def dequantize_tiles(words, scales, out, K, N, groups, tile_words, BITS: tl.constexpr, QUADS: tl.constexpr):
    """One group of one tile → ``out`` [N, K]."""
    tile, group = tl.program_id(0), tl.program_id(1)
    LANES: tl.constexpr = 4 * BITS
    OFFSET: tl.constexpr = 384.0 if BITS == 8 else 24.0
    base = (tile.to(tl.int64) * groups + group) * tile_words
    lane, quad = tl.arange(0, 32), tl.arange(0, QUADS)
    at = base + SCALE_WORDS + quad[None, :] * LANES + (lane % LANES)[:, None]
    word = tl.load(words + at)  # [32, QUADS]
    if BITS == 4:
        word = word >> (4 * (lane // 16))[:, None]
    scale = tl.load(scales + 2 * base + lane).to(tl.float32)[:, None]
    # Four columns of each word, in their order: interleaving (0, 2) with (1, 3).
    even = tl.interleave(_values(word, 0, BITS) - OFFSET, _values(word, 16, BITS) - OFFSET)
    odd = tl.interleave(_values(word, 8, BITS) - OFFSET, _values(word, 24, BITS) - OFFSET)
    values = tl.interleave(even, odd) * scale  # [32, 4 · QUADS]
    output = tile * 32 + lane
    column = group * 4 * QUADS + tl.arange(0, 4 * QUADS)
    to = out + output.to(tl.int64)[:, None] * K + column[None, :]
    tl.store(to, values.to(out.dtype.element_ty), mask=(output < N)[:, None])


def _views(tiles: Tensor, bits: int) -> tuple[Tensor, Tensor, int, int, int]:
    """``tiles`` as words and as scales, the groups, the words of a tile and of four inputs in a group."""
    groups, group = tile_groups(tiles, bits)
    return (tiles.view(torch.int32), tiles.view(torch.bfloat16), groups, tiles.shape[2] // 4, group // 4)


def dequantize(tiles: Tensor, outputs: int, bits: int, dtype: torch.dtype) -> Tensor:
    """The weight [outputs, K] as ``dtype``."""
    words, scales, groups, tile_words, quads = _views(tiles, bits)
    out = torch.empty(outputs, groups * quads * 4, dtype=dtype, device=tiles.device)
    dequantize_tiles[(len(tiles), groups)](
        words, scales, out, out.shape[1], outputs, groups, tile_words, BITS=bits, QUADS=quads, num_warps=4
    )
    return out


def product(x: Tensor, tiles: Tensor, outputs: int, bits: int, matrix_units: bool) -> Tensor | None:
    """``x`` [T, K] → [T, outputs] of its dtype, straight from the quantised weight; None where dequantising
    it first is better: for many tokens, or for more than a few without ``matrix_units`` for the dtype."""
    words, scales, groups, tile_words, quads = _views(tiles, bits)
    count, inputs = x.shape
    y = x.new_empty(count, outputs)
    if count <= FEW_TOKENS:
        block = max(1, min(triton.next_power_of_2(groups), (256 if bits == 8 else 512) // quads // 2))
        few_tokens[(len(tiles),)](
            x, words, scales, y, count, inputs, outputs, groups, tile_words,
            T=triton.next_power_of_2(count), BITS=bits, QUADS=quads, BLOCK=block, num_warps=8,
        )  # fmt: skip
        return y
    if count > MANY_TOKENS or not matrix_units or quads < 16 or x.dtype == torch.float32:
        return None
    tokens = max(16, triton.next_power_of_2(count))
    width = 64
    many_tokens[(triton.cdiv(outputs, width), triton.cdiv(count, tokens))](
        x, words, scales, y, count, inputs, outputs, groups, tile_words,
        BITS=bits, QUADS=quads, TOKENS=tokens, OUTPUTS=width, num_warps=4, num_stages=4,
    )  # fmt: skip
    return y
