"""Attention over a paged cache: keys and values in blocks of positions, in the model's dtype or as int8.

int8 values have one float32 scale for each position and head (symmetric, largest magnitude = 127). On the CPU
the kernels of ``csrc/attention*`` handle head sizes that are multiples of 32. On CUDA, ``page_size`` decides:
blocks of 256 positions are read by PyTorch's ``varlen_attn`` (FlashAttention-2), others by the Triton kernels
of ``gpu/attention.py``. Elsewhere PyTorch's attention runs over gathered blocks.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

import xverse.kernels.cuda  # noqa: F401  (registers the operations on CUDA)
from xverse.gpu import VARLEN_PAGE, has_varlen
from xverse.kernels.native import CACHE_TYPES, TYPES, Cache, call, library
from xverse.kernels.ops import OPERATIONS
from xverse.model.attention import attention, causal_varlen

PAGE = 32  # positions
_LARGEST_HEAD = 256
_PARTLY_USED = 4  # spare large blocks, one for each sequence, may take a quarter of a cache


def page_size(device: torch.device, dtype: torch.dtype, head_dim: int, *, tokens: int, sequences: int) -> int:
    """Positions in a block of a cache of ``dtype`` for ``tokens`` and at most ``sequences`` at a time: those
    that ``varlen_attn`` needs if it is available and the cache is large enough for blocks that are partly
    used, otherwise ``PAGE``."""
    room = tokens >= _PARTLY_USED * VARLEN_PAGE * sequences
    return VARLEN_PAGE if room and has_varlen(device, dtype, head_dim, paged=True) else PAGE


def head_fits(head_dim: int) -> bool:
    """Whether the kernels of the CPU handle heads of this size."""
    return head_dim % 32 == 0 and head_dim <= _LARGEST_HEAD


class PagedLayer:
    """One layer's cache: ``keys`` and ``values`` [blocks, KV, block_size, head_dim], float or int8.

    int8 needs ``key_scales`` and ``value_scales`` float32 [blocks, KV, block_size]. A block is contiguous;
    there may be gaps between blocks. The tensors must not move.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        key_scales: Tensor | None = None,
        value_scales: Tensor | None = None,
    ) -> None:
        assert keys.shape == values.shape
        assert (keys.dtype == torch.int8) == (key_scales is not None) == (value_scales is not None)
        self.keys, self.values = keys, values
        self.flash = keys.shape[2] % VARLEN_PAGE == 0 and has_varlen(
            keys.device, keys.dtype, keys.shape[3], paged=True
        )
        self.key_scales, self.value_scales = key_scales, value_scales
        _, self.heads, self.block_size, self.head_dim = keys.shape
        self._struct: Any = None
        self.address: int | None = None  # of the Cache struct; None: the kernels do not support this cache
        if keys.device.type == "cpu" and keys.dtype in CACHE_TYPES and self._fits():
            scales = [s for s in (key_scales, value_scales) if s is not None]
            tensors: list[Tensor] = [keys, values, *scales]
            for tensor in tensors:
                assert tensor[:1].is_contiguous(), "blocks must be contiguous"
            pointers, strides = [t.data_ptr() for t in tensors], [t.stride(0) for t in tensors]
            filler: list[int | None] = [None] * (4 - len(tensors))
            struct = Cache(
                *pointers, *filler, *strides, *[0] * len(filler),
                CACHE_TYPES[keys.dtype], self.heads, self.block_size, self.head_dim,
            )  # fmt: skip
            self._struct = ctypes.byref(struct)
            self.address = ctypes.addressof(struct)

    def _fits(self) -> bool:
        return head_fits(self.head_dim) and self.block_size % 16 == 0

    def _native(self, *rows: Tensor) -> bool:
        """Whether the kernels support ``rows`` [T, heads, head_dim] with this cache."""
        if library() is None or self._struct is None:
            return False
        exact = self.keys.dtype == torch.bfloat16
        return all(
            row.dtype in TYPES and row.stride(2) == 1 and (not exact or row.dtype == torch.bfloat16)
            for row in rows
        )

    def append(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Store ``k`` and ``v`` [T, KV, head_dim] at ``slots`` int64 [T]: block * block_size + offset."""
        if k.device.type == "cuda":
            torch.ops.xverse.paged_append(k, v, *self._pages(), slots)
        elif k.dtype != v.dtype or not self._native(k, v):
            self._append_torch(k, v, slots)
        else:
            strides = k.stride(0), k.stride(1), v.stride(0), v.stride(1)
            call("xv_paged_append", self._struct, k, v, slots, TYPES[k.dtype], len(slots), *strides)

    def attend(self, q: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        """Independent queries: ``q`` [B, H, head_dim] → attention output of the same shape and dtype.

        H is a multiple of the cache's KV heads; consecutive query heads share one of them.
        ``table`` int32 [B, blocks] (rows may be strided) lists the blocks of each query's sequence in order;
        ``lengths`` int32 [B], at least 1, is the number of positions that the query sees. Scores are scaled
        by head_dim**-0.5. Long contexts are divided among threads and merged (Flash-Decoding, Dao et al.,
        2023). In the kernels the bits of a row depend on that row alone. Put queries of one sequence next to
        each other, with increasing lengths: its keys and values are then read from memory once. A sequence
        that holds NaN or infinity gives NaN and does not affect the others.
        """
        if self.flash and q.dtype == self.keys.dtype:
            starts = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
            return self.extend(q, starts, table, lengths, 1)
        if q.device.type == "cuda":
            return torch.ops.xverse.paged_attention(q, *self._pages(), table, lengths)
        if not self._native(q):
            return self._attend_torch(q, table, lengths)
        out = q.new_empty(q.shape)  # [B, H, head_dim]
        call(
            "xv_paged_attention", self._struct, q, table, lengths, out, TYPES[q.dtype], len(q),
            table.stride(0), q.stride(0), q.stride(1), q.shape[1] // self.heads,
        )  # fmt: skip
        return out

    def extend(self, q: Tensor, starts: Tensor, table: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """The last tokens of several sequences in one call, if ``flash``: ``q`` [N, H, head_dim], those of
        sequence i from ``starts[i]`` to ``starts[i + 1]``, int32 [S + 1]; ``longest`` is the most of one.
        Each sees its predecessors and itself among the ``lengths`` int32 [S] positions of the sequence.
        ``table`` int32 [S, blocks]."""
        keys, values = self.keys.transpose(1, 2), self.values.transpose(1, 2)  # [pages, page, H, head_dim]
        most = table.shape[1] * self.block_size
        return causal_varlen(
            q, keys, values, starts, None, longest, most, seqused_k=lengths, block_table=table
        )

    def prefill(self, q: Tensor, table: Tensor, start: int) -> Tensor:
        """A chunk of one sequence: ``q`` [T, H, head_dim] at positions ``start`` and up → the same shape and
        dtype.

        Query i sees the positions 0 to start + i, which are in the cache already. ``table`` int32 [blocks].
        """
        if self.flash and q.dtype == self.keys.dtype:
            ends = torch.arange(0, len(q) + 1, len(q), dtype=torch.int32, device=q.device)
            length = torch.full((1,), start + len(q), dtype=torch.int32, device=q.device)
            return self.extend(q, ends, table[None], length, len(q))
        if q.dtype != torch.bfloat16 or self.keys.dtype == torch.float32 or not self._native(q):
            return self._prefill_torch(q, table, start)
        out = q.new_empty(q.shape)  # [T, H, head_dim]
        group = q.shape[1] // self.heads
        call("xv_paged_prefill", self._struct, q, table, out, start, len(q), q.stride(0), q.stride(1), group)
        return out

    def _pages(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.keys, self.values, self.key_scales, self.value_scales

    # ---- the same with PyTorch's operations, on any device ----

    def _append_torch(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        blocks, offsets = slots // self.block_size, slots % self.block_size  # [T]
        for rows, pages, scales in ((k, self.keys, self.key_scales), (v, self.values, self.value_scales)):
            if scales is None:
                pages[blocks, :, offsets] = rows.to(pages.dtype)
            else:
                pages[blocks, :, offsets], scales[blocks, :, offsets] = quantize_rows(rows)

    def _attend_torch(self, q: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        seen = torch.arange(table.shape[1] * self.block_size, device=q.device) < lengths[:, None]  # [B, M]
        # Unwritten positions may hold NaN, which a mask would not remove.
        keys, values = (x.masked_fill(~seen[:, None, :, None], 0) for x in self._gather(table, q.dtype))
        mask = seen[:, None, None]  # [B, 1, 1, M]
        return attention(q[:, :, None], keys, values, mask)[:, :, 0]

    def _prefill_torch(self, q: Tensor, table: Tensor, start: int) -> Tensor:
        end = start + len(q)
        keys, values = self.gather(table, end, q.dtype)  # [KV, end, head_dim]
        if has_varlen(q.device, q.dtype, self.head_dim):
            own, seen = (
                torch.arange(0, count + 1, count, dtype=torch.int32, device=q.device)
                for count in (len(q), end)
            )
            return causal_varlen(q, keys.transpose(0, 1), values.transpose(0, 1), own, seen, len(q), end)
        mask = None
        if start:
            positions = torch.arange(end, device=q.device)
            mask = positions <= positions[start:, None]  # [T, end]
        mixed = attention(
            q.transpose(0, 1)[None], keys[None], values[None], mask, causal=start == 0
        )  # [1, H, T, head_dim]
        return mixed[0].transpose(0, 1)

    def gather(self, blocks: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [KV, length, head_dim] of the sequence in ``blocks`` int32 [M], as ``dtype``."""
        keys, values = self._gather(blocks[None, : -(-length // self.block_size)], dtype)
        return keys[0, :, :length], values[0, :, :length]

    def _gather(self, table: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [B, KV, M · block_size, head_dim] in the blocks of ``table`` int32 [B, M]."""
        index = table.long()

        def gathered(pages: Tensor, scales: Tensor | None) -> Tensor:
            rows = pages[index]  # [B, M, KV, block_size, head_dim]
            if scales is not None:
                rows = rows.float() * scales[index][..., None]
            return rows.to(dtype).transpose(1, 2).flatten(2, 3)

        return gathered(self.keys, self.key_scales), gathered(self.values, self.value_scales)


def _gathered_attention(
    q: Tensor, keys: Tensor, values: Tensor,
    key_scales: Tensor | None, value_scales: Tensor | None, table: Tensor, lengths: Tensor,
) -> Tensor:  # fmt: skip
    return PagedLayer(keys, values, key_scales, value_scales)._attend_torch(q, table, lengths)


def _plain_append(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor,
    key_scales: Tensor | None, value_scales: Tensor | None, slots: Tensor,
) -> None:  # fmt: skip
    PagedLayer(keys, values, key_scales, value_scales)._append_torch(k, v, slots)


OPERATIONS.impl("paged_attention", _gathered_attention, "CompositeExplicitAutograd")
OPERATIONS.impl("paged_append", _plain_append, "CompositeExplicitAutograd")


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` [..., head_dim] → int8 of the same shape and its float32 scales [...].

    A row with NaN or infinity gets zeros and the scale NaN, so that it cannot pass for a number.
    """
    x = x.float()
    largest = x.abs().amax(dim=-1)  # [...], NaN where x has one
    usable = largest.isfinite() & (largest >= 127 * torch.finfo(torch.float32).tiny)
    inverse = 127 / largest.where(usable, 1)
    values = torch.where(usable[..., None], x * inverse[..., None], 0).round().to(torch.int8)
    return values, (largest / 127).where(usable, torch.where(largest.isfinite(), 0.0, torch.nan))
