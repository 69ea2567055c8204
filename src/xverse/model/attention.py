"""Attention contexts: objects that provide positions, mask and cache.

The model's one forward pass serves training (packed documents), transformers' caches (``hf/``) and the
engine's cache (``engine/``), each with its own context.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from xverse.gpu import has_varlen


class AttentionContext(Protocol):
    """``positions`` int64 [B, T] are those of rotary embedding; ``attend`` computes attention.

    A context may also have ``rope_lengths``, see ``rope_tables``.
    """

    positions: Tensor

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotated q [B, H, T, head_dim] and k, plain v [B, KV, T, head_dim] of one layer → attention output
        of q's shape. H is a multiple of KV; consecutive query heads share a key head."""
        ...


class FullCausal:
    """Plain causal attention without a cache."""

    def __init__(self, batch: int, length: int, device: torch.device | str = "cpu") -> None:
        self.positions = torch.arange(length, device=device).expand(batch, length)  # [B, T]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped(q, k))


def grouped(q: Tensor, k: Tensor) -> bool:
    """Whether several query heads [B, H, …] share a key head [B, KV, …]."""
    return q.shape[1] != k.shape[1]


_ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """``scaled_dot_product_attention`` for lengths that keep changing: without cuDNN, which PyTorch prefers
    on Hopper and Blackwell and which builds a plan of some 30 ms for every new shape."""
    with sdpa_kernel(_ANY_LENGTH) if q.device.type == "cuda" else contextlib.nullcontext():
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped(q, k)
        )


def causal_varlen(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor | None, longest_q: int, longest_k: int,
    **paged: Tensor,
) -> Tensor:  # fmt: skip
    """Sequences one after another: ``q`` [N, H, head_dim], sequence i from ``q_ends[i]`` to
    ``q_ends[i + 1]``, int32 [S + 1]; the same for ``k`` and ``v``. The last query of a sequence sees all of
    its keys. ``longest_q`` and ``longest_k`` bound the lengths from above. ``paged`` is its block
    table, with ``k`` and ``v`` [pages, page, H, head_dim]. Only where ``has_varlen``."""
    from torch.nn.attention.varlen import varlen_attn

    sequences: Any = (q_ends, k_ends, longest_q, longest_k)
    out = varlen_attn(q, k, v, *sequences, window_size=(-1, 0), **paged)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    return out


class Packed:
    """Several documents packed in a row of tokens: each attends only to itself, with positions from 0.

    ``document_ids`` int [B, T]: equal neighbours belong to one document. If each row is one document,
    attention runs in one call of PyTorch's attention; otherwise in one call of ``varlen_attn`` on a GPU that
    has it, else document by document, so that masked pairs cost nothing. ``device`` is where attention runs:
    ids on the CPU save waiting for it.
    """

    def __init__(self, document_ids: Tensor, device: torch.device | None = None) -> None:
        batch, length = document_ids.shape
        device = device or document_ids.device
        first, positions = document_starts(document_ids)  # [B, T] each
        self.positions = positions.to(device, non_blocking=True)
        starts = first.flatten().nonzero().flatten().tolist()
        bounds = torch.tensor([*starts, batch * length], dtype=torch.int32)
        self._longest = int(bounds.diff().max())
        self._whole_rows = len(starts) == batch
        self._bounds = bounds.to(device, non_blocking=True)

    @classmethod
    def flattened(cls, bounds: Tensor, longest: int, positions: Tensor) -> Packed:
        """One row, from the ends of its documents, int32 [n + 1] from 0, the most tokens of a document, and
        ``positions`` int64 [1, T]: nothing is read from the device."""
        packed = cls.__new__(cls)
        packed.positions, packed._bounds, packed._longest = positions, bounds, longest
        packed._whole_rows = len(bounds) == 2
        return packed

    @functools.cached_property
    def _lengths(self) -> list[int]:
        return self._bounds.diff().tolist()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._whole_rows:
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped(q, k))
        batch, heads, length, head_dim = q.shape
        if has_varlen(q.device, q.dtype, head_dim):
            rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # [B*T, H, head_dim]
            ends, longest = self._bounds, self._longest
            one = causal_varlen(rows[0], rows[1], rows[2], ends, ends, longest, longest)
            return one.view(batch, length, heads, head_dim).transpose(1, 2)
        split = [
            x.transpose(0, 1).reshape(1, -1, batch * length, head_dim).split(self._lengths, dim=2)
            for x in (q, k, v)
        ]
        documents = [attention(q_d, k_d, v_d, causal=True) for q_d, k_d, v_d in zip(*split, strict=True)]
        mixed = torch.cat(documents, dim=2)  # [1, H, B*T, head_dim]
        return mixed.reshape(heads, batch, length, head_dim).transpose(0, 1)


class Continued:
    """Sequences in one row [1, T], one after another, of which some continue others: replies to a prompt,
    which is computed once.

    Sequence i has the tokens from ``q_ends[i]`` to ``q_ends[i + 1]``, int32 [n + 1] from 0; it sees the
    ``places[k_ends[i]:k_ends[i + 1]]`` of the row, int64 [K], the last of which are its own. ``longest``: the
    most tokens of a sequence, and the most that one sees.
    """

    def __init__(
        self, positions: Tensor, q_ends: Tensor, k_ends: Tensor, places: Tensor, longest: tuple[int, int]
    ) -> None:
        self.positions, self._places, self._longest = positions, places, longest
        self._q_ends, self._k_ends = q_ends, k_ends

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.index_select(2, self._places), v.index_select(2, self._places)  # [1, KV, K, head_dim]
        if has_varlen(q.device, q.dtype, q.shape[3]):
            rows = [x[0].transpose(0, 1) for x in (q, k, v)]
            mixed = causal_varlen(rows[0], rows[1], rows[2], self._q_ends, self._k_ends, *self._longest)
            return mixed.transpose(0, 1)[None]
        queries = q.split(self._q_ends.diff().tolist(), dim=2)
        keys, values = (x.split(self._k_ends.diff().tolist(), dim=2) for x in (k, v))
        return torch.cat([_continue(*part) for part in zip(queries, keys, values, strict=True)], dim=2)


def _continue(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of ``q`` [1, H, L, head_dim], of the last tokens of ``k`` and ``v`` [1, KV, S, head_dim]."""
    length, seen = q.shape[2], k.shape[2]
    if length == seen:
        return attention(q, k, v, causal=True)
    return attention(q, k, v, torch.ones(length, seen, dtype=torch.bool, device=q.device).tril(seen - length))


def document_starts(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """From ``document_ids`` int [B, T]: which tokens start a document, bool [B, T], and each token's position
    in its document, int64 [B, T]."""
    batch, length = document_ids.shape
    index = torch.arange(length, device=document_ids.device).expand(batch, length)  # [B, T]
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return first, index - torch.where(first, index, 0).cummax(dim=1).values
