"""The paged cache on a GPU as Triton kernels: append, and attention of independent queries, in the model's
dtype or int8. They serve what ``varlen_attn`` does not: int8, Turing, float32, PyTorch before 2.13."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 1024  # enough to fill any GPU; few sequences are split into this many parts in all
_MOST_SPLITS = 32


@triton.jit
def append_rows(
    rows, pages, scales, slots, heads, row_stride, head_stride, page_stride, scale_stride,
    PAGE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """One token's head of ``rows`` [T, H, D] → its slot of ``pages`` [blocks, H, PAGE, D], quantised as
    ``quantize_rows`` does."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    column = tl.arange(0, WIDTH)
    x = tl.load(rows + token * row_stride + head * head_stride + column, mask=column < D, other=0.0)
    block, place = slot // PAGE, head * PAGE + slot % PAGE
    to = pages + block * page_stride + place * D + column
    if INT8:
        x = x.to(tl.float32)
        # NaN is not equal to itself, and infinity minus itself is NaN.
        finite = tl.min((x - x == 0.0).to(tl.int32), axis=0) == 1
        largest = tl.max(tl.abs(x), axis=0)
        usable = finite & (largest >= 127 * 1.1754944e-38)
        scaled = tl.where(usable, x * (127.0 / tl.where(usable, largest, 1.0)), 0.0)
        # Adding and subtracting 1.5 · 2^23 rounds half to even.
        rounded = (scaled + 12582912.0) - 12582912.0
        tl.store(to, rounded.to(tl.int8), mask=column < D)
        kept = tl.where(usable, largest / 127.0, tl.where(finite, 0.0, float("nan")))
        tl.store(scales + block * scale_stride + place, kept)
    else:
        tl.store(to, x.to(pages.dtype.element_ty), mask=column < D)


@triton.jit
def attend_part(
    q, keys, values, key_scales, value_scales, table, lengths, parts, tops, sums,
    heads, group, splits, scale, q_row, q_head, table_row, page_stride, scale_stride,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """One query's head over every ``splits``-th run of ``BLOCK`` positions: the unnormalised sum of values
    ``parts`` [B, H, splits, D], the largest score ``tops`` and the sum of weights ``sums`` [B, H, splits]."""
    row, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    column = tl.arange(0, WIDTH)
    inside = column < D
    query = tl.load(q + row * q_row + head * q_head + column, mask=inside, other=0.0).to(tl.float32) * scale
    total = tl.zeros((WIDTH,), tl.float32)
    top = -float("inf")
    weight = 0.0
    for start in range(split * BLOCK, length, splits * BLOCK):
        position = start + tl.arange(0, BLOCK)
        seen = position < length
        block = tl.load(table + row * table_row + position // PAGE, mask=seen, other=0).to(tl.int64)
        place = head // group * PAGE + position % PAGE
        at = (block * page_stride + place * D)[:, None] + column[None, :]
        key = tl.load(keys + at, mask=seen[:, None] & inside[None, :], other=0).to(tl.float32)
        score = tl.sum(key * query[None, :], axis=1)  # [BLOCK]
        if INT8:
            score *= tl.load(key_scales + block * scale_stride + place, mask=seen, other=0.0)
        score = tl.where(seen, score, -float("inf"))
        highest = tl.maximum(top, tl.max(score, axis=0))
        shrunk = tl.exp(top - highest)
        share = tl.exp(score - highest)
        weight = weight * shrunk + tl.sum(share, axis=0)
        if INT8:
            share *= tl.load(value_scales + block * scale_stride + place, mask=seen, other=0.0)
        value = tl.load(values + at, mask=seen[:, None] & inside[None, :], other=0).to(tl.float32)
        total = total * shrunk + tl.sum(value * share[:, None], axis=0)
        top = highest
    one = (row * heads + head) * splits + split
    tl.store(parts + one * D + column, total, mask=inside)
    tl.store(tops + one, top)
    tl.store(sums + one, weight)


@triton.jit
def merge_parts(parts, tops, sums, out, splits, D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """One query's head of ``parts`` [B·H, splits, D] → ``out`` [B·H, D]. Scores of NaN give NaN."""
    row = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    top = tl.load(tops + row * splits + split, mask=split < splits, other=-float("inf"))
    share = tl.exp(top - tl.max(top, axis=0))
    share = tl.where(top == -float("inf"), 0.0, share)  # parts beyond the end of the sequence
    weight = tl.sum(share * tl.load(sums + row * splits + split, mask=split < splits, other=0.0), axis=0)
    at = (row * splits + split)[:, None] * D + column[None, :]
    part = tl.load(parts + at, mask=(split < splits)[:, None] & (column < D)[None, :], other=0.0)
    total = tl.sum(part * share[:, None], axis=0) / weight
    tl.store(out + row * D + column, total.to(out.dtype.element_ty), mask=column < D)


def append(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor,
    key_scales: Tensor | None, value_scales: Tensor | None, slots: Tensor,
) -> None:  # fmt: skip
    """``PagedLayer.append``."""
    for rows, pages, scales in ((k, keys, key_scales), (v, values, value_scales)):
        count, heads, size = rows.shape
        assert rows.stride(2) == 1
        append_rows[(count, heads)](
            rows, pages, pages if scales is None else scales, slots, heads, rows.stride(0), rows.stride(1),
            pages.stride(0), 0 if scales is None else scales.stride(0),
            PAGE=pages.shape[2], D=size, WIDTH=triton.next_power_of_2(size), INT8=scales is not None,
            num_warps=1,
        )  # fmt: skip


def attend(
    q: Tensor, keys: Tensor, values: Tensor,
    key_scales: Tensor | None, value_scales: Tensor | None, table: Tensor, lengths: Tensor,
) -> Tensor:  # fmt: skip
    """``PagedLayer.attend``. The number of splits depends on shapes alone, so that a graph may hold it."""
    count, heads, size = q.shape
    page, width = keys.shape[2], triton.next_power_of_2(size)
    block = 32 if width <= 128 else 16
    most = triton.cdiv(table.shape[1] * page, 4 * block)
    splits = max(1, min(_MOST_SPLITS, most, triton.cdiv(_PROGRAMS, count * heads)))
    parts = torch.empty(count, heads, splits, size, dtype=torch.float32, device=q.device)
    tops, sums = torch.empty(2, count, heads, splits, dtype=torch.float32, device=q.device)
    quantised = key_scales is not None
    attend_part[(count, heads, splits)](
        q, keys, values, key_scales if quantised else keys, value_scales if quantised else values, table,
        lengths, parts, tops, sums, heads, heads // keys.shape[1], splits, size**-0.5, q.stride(0),
        q.stride(1), table.stride(0), keys.stride(0), key_scales.stride(0) if key_scales is not None else 0,
        PAGE=page, BLOCK=block, D=size, WIDTH=width, INT8=quantised, num_warps=4,
    )  # fmt: skip
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    merge_parts[(count * heads,)](
        parts, tops, sums, out, splits,
        D=size, WIDTH=width, SPLITS=triton.next_power_of_2(splits), num_warps=1,
    )  # fmt: skip
    return out
