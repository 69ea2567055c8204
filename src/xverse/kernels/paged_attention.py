"""Attention over a paged cache: keys and values in blocks of positions, in the model's type or as int8.

int8 values have one float32 scale for each position and head (symmetric, largest magnitude = 127). The
kernels (csrc/attention*) do head sizes that are multiples of 32 on a CPU; everything else, and a checkout
without them, goes through PyTorch's attention over gathered blocks.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from xverse.kernels.native import kernel_name, library

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_LARGEST_HEAD = 256


class _Cache(ctypes.Structure):
    """``Cache`` of csrc/attention_api.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name + "_stride", ctypes.c_int64) for name in ("key", "value", "key_scale", "value_scale")),
        *((name, ctypes.c_int) for name in ("type", "heads", "block_size", "head_dim")),
    )


class PagedLayer:
    """One layer's cache: ``keys`` and ``values`` [blocks, H, block_size, head_dim], float or int8.

    With int8 come ``key_scales`` and ``value_scales`` float32 [blocks, H, block_size]. A block is contiguous;
    blocks may lie apart. The tensors have to stay where they are.
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
        self.key_scales, self.value_scales = key_scales, value_scales
        _, self.heads, self.block_size, self.head_dim = keys.shape
        self._struct: Any = None
        self.address: int | None = None  # of what the kernels know it by
        if keys.device.type == "cpu" and keys.dtype in _TYPES and self._fits():
            scales = [s for s in (key_scales, value_scales) if s is not None]
            tensors: list[Tensor] = [keys, values, *scales]
            for tensor in tensors:
                assert tensor[:1].is_contiguous(), "a block is to be contiguous"
            pointers, strides = [t.data_ptr() for t in tensors], [t.stride(0) for t in tensors]
            filler: list[int | None] = [None] * (4 - len(tensors))
            struct = _Cache(
                *pointers, *filler, *strides, *[0] * len(filler),
                _TYPES[keys.dtype], self.heads, self.block_size, self.head_dim,
            )  # fmt: skip
            self._struct = ctypes.byref(struct)
            self.address = ctypes.addressof(struct)

    def _fits(self) -> bool:
        return self.head_dim % 32 == 0 and self.head_dim <= _LARGEST_HEAD and self.block_size % 16 == 0

    def _native(self, *rows: Tensor) -> ctypes.CDLL | None:
        """The kernels, where they take ``rows`` [T, H, head_dim] with this cache."""
        kernels = _kernels()
        if kernels is None or self._struct is None:
            return None
        for row in rows:
            if row.dtype not in (torch.float32, torch.bfloat16) or row.stride(2) != 1:
                return None
            if row.dtype != self.keys.dtype == torch.bfloat16:
                return None
        return kernels

    def append(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Write ``k`` and ``v`` [T, H, head_dim] at ``slots`` int64 [T]: block * block_size + offset."""
        kernels = self._native(k, v)
        if kernels is None or k.dtype != v.dtype:
            return self._append_torch(k, v, slots)
        kernels.xv_paged_append(
            self._struct, k.data_ptr(), v.data_ptr(), slots.data_ptr(), _TYPES[k.dtype],
            len(slots), k.stride(0), k.stride(1), v.stride(0), v.stride(1), torch.get_num_threads(),
        )  # fmt: skip
        return None

    def attend(self, q: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        """Single queries: ``q`` [B, H, head_dim] → mixed values of the same shape.

        ``table`` int32 [B, blocks] names the blocks of each query's sequence in order (rows may lie apart),
        of which ``lengths`` int32 [B] positions count, at least 1. Scores are scaled by head_dim**-0.5. Long
        contexts are divided among the threads and merged (Flash-Decoding, Dao et al., 2023). In the kernels a
        row's bits depend on that row alone. Several queries of one sequence, with growing lengths, are best
        neighbours: its keys and values are then read from memory once. A sequence with NaN or infinity in it
        gives NaN and leaves the others alone.
        """
        kernels = self._native(q)
        if kernels is None:
            return self._attend_torch(q, table, lengths)
        out = q.new_empty(q.shape)  # [B, H, head_dim]
        kernels.xv_paged_attention(
            self._struct, q.data_ptr(), table.data_ptr(), lengths.data_ptr(), out.data_ptr(),
            _TYPES[q.dtype], len(q), table.stride(0), q.stride(0), q.stride(1), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def prefill(self, q: Tensor, table: Tensor, start: int) -> Tensor:
        """A chunk of one sequence: ``q`` [T, H, head_dim] at the positions from ``start`` → the same shape.

        Query i sees the positions 0 to start + i, which are in the cache already. ``table`` int32 [blocks].
        """
        kernels = self._native(q)
        if kernels is None or q.dtype != torch.bfloat16 or self.keys.dtype == torch.float32:
            return self._prefill_torch(q, table, start)
        if not kernels.xv_has_prefill():
            return self._prefill_torch(q, table, start)
        out = q.new_empty(q.shape)  # [T, H, head_dim]
        kernels.xv_paged_prefill(
            self._struct, q.data_ptr(), table.data_ptr(), out.data_ptr(),
            start, len(q), q.stride(0), q.stride(1), torch.get_num_threads(),
        )  # fmt: skip
        return out

    # ---- the same with PyTorch's operations, on any device ----

    def _append_torch(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        blocks, offsets = slots // self.block_size, slots % self.block_size  # [T]
        for rows, pages, scales in (
            (k, self.keys, self.key_scales),
            (v, self.values, self.value_scales),
        ):
            if scales is None:
                pages[blocks, :, offsets] = rows.to(pages.dtype)
            else:
                pages[blocks, :, offsets], scales[blocks, :, offsets] = quantize_rows(rows)

    def _attend_torch(self, q: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        seen = torch.arange(table.shape[1] * self.block_size, device=q.device) < lengths[:, None]  # [B, M]
        # What nobody wrote may be NaN, which no mask hides.
        keys, values = (x.masked_fill(~seen[:, None, :, None], 0) for x in self._gather(table, q.dtype))
        mask = seen[:, None, None]  # [B, 1, 1, M]
        return scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask)[:, :, 0]

    def _prefill_torch(self, q: Tensor, table: Tensor, start: int) -> Tensor:
        end = start + len(q)
        keys, values = self.gather(table, end, q.dtype)  # [H, end, head_dim]
        mask = None
        if start:
            positions = torch.arange(end, device=q.device)
            mask = positions <= positions[start:, None]  # [T, end]
        mixed = scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, is_causal=start == 0
        )  # [1, H, T, head_dim]
        return mixed[0].transpose(0, 1)

    def gather(self, blocks: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [H, length, head_dim] of the sequence in ``blocks`` int32, as ``dtype``."""
        keys, values = self._gather(blocks[None, : -(-length // self.block_size)], dtype)
        return keys[0, :, :length], values[0, :, :length]

    def _gather(self, table: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, M · block_size, head_dim] in the blocks of ``table`` int32 [B, M]."""
        wanted = table.long()

        def joined(pages: Tensor, scales: Tensor | None) -> Tensor:
            found = pages[wanted]  # [B, M, H, block_size, head_dim]
            if scales is not None:
                found = found.float() * scales[wanted][..., None]
            return found.to(dtype).transpose(1, 2).flatten(2, 3)

        return joined(self.keys, self.key_scales), joined(self.values, self.value_scales)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` [..., head_dim] → int8 of the same shape and its float32 scales [...].

    A row with NaN or infinity gets zeros and the scale NaN: it must not pass for a number.
    """
    x = x.float()
    largest = x.abs().amax(dim=-1)  # [...], NaN where x has one
    usable = largest.isfinite() & (largest >= 127 * torch.finfo(torch.float32).tiny)
    inverse = 127 / largest.where(usable, 1)
    values = torch.where(usable[..., None], x * inverse[..., None], 0).round().to(torch.int8)
    return values, (largest / 127).where(usable, torch.where(largest.isfinite(), 0.0, torch.nan))


@functools.cache
def _kernels() -> ctypes.CDLL | None:
    found = library()
    if found is not None:
        found.xv_has_prefill.restype = ctypes.c_int
        found.xv_select_attention(kernel_name().encode())
    return found


# ---- as PyTorch operations, which torch.compile can trace ----

_library = torch.library.Library("xverse", "FRAGMENT")
_CACHE = "Tensor keys, Tensor values, Tensor? key_scales, Tensor? value_scales"
_library.define(
    "paged_append(Tensor k, Tensor v, Tensor slots, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor(c!)? key_scales, Tensor(d!)? value_scales) -> ()"
)
_library.define(f"paged_attention(Tensor q, {_CACHE}, Tensor table, Tensor lengths) -> Tensor")
_library.define(f"paged_prefill(Tensor q, {_CACHE}, Tensor table, int start) -> Tensor")

_Scales = Tensor | None


def paged_append(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: _Scales,
    value_scales: _Scales,
) -> None:
    """``PagedLayer.append`` with the layer's tensors as arguments."""
    PagedLayer(keys, values, key_scales, value_scales).append(k, v, slots)


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: _Scales,
    value_scales: _Scales,
    table: Tensor,
    lengths: Tensor,
) -> Tensor:
    """``PagedLayer.attend`` with the layer's tensors as arguments."""
    return PagedLayer(keys, values, key_scales, value_scales).attend(q, table, lengths).contiguous()


def paged_prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: _Scales,
    value_scales: _Scales,
    table: Tensor,
    start: int,
) -> Tensor:
    """``PagedLayer.prefill`` with the layer's tensors as arguments."""
    return PagedLayer(keys, values, key_scales, value_scales).prefill(q, table, start).contiguous()


def _shape_of_queries(q: Tensor, *rest: object) -> Tensor:
    return q.new_empty(q.shape)


for _key in ("CPU", "CUDA"):
    _library.impl("paged_append", paged_append, _key)
    _library.impl("paged_attention", paged_attention, _key)
    _library.impl("paged_prefill", paged_prefill, _key)
torch.library.register_fake("xverse::paged_append", lambda *arguments: None, lib=_library)
torch.library.register_fake("xverse::paged_attention", _shape_of_queries, lib=_library)
torch.library.register_fake("xverse::paged_prefill", _shape_of_queries, lib=_library)
