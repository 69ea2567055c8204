"""Attention contexts: objects that provide positions, mask and cache.

The model's one forward pass serves training (packed documents), transformers' caches (``hf/``) and the
engine's cache (``engine/``), each with its own context.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class AttentionContext(Protocol):
    """``positions`` int64 [B, T] are those of rotary embedding; ``attend`` computes attention.

    A context may also have ``rope_lengths``, see ``rope_tables``.
    """

    positions: Tensor

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotated q [B, H, T, head_dim] and k, plain v [B, KV, T, head_dim] of one layer → attention output
        of q's shape. H is a multiple of KV; consecutive query heads share a key head."""
        ...


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q [B, H, T, head_dim] over k and v [B, KV, T, head_dim], in q's shape."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class FullCausal:
    """Plain causal attention without a cache."""

    def __init__(self, batch: int, length: int, device: torch.device | str = "cpu") -> None:
        self.positions = torch.arange(length, device=device).expand(batch, length)  # [B, T]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(q, k, v)


class Packed:
    """Several documents packed in a row of tokens: each attends only to itself, with positions from 0.

    ``document_ids`` int [B, T]: equal neighbours belong to one document. Attention runs document by
    document, so that masked pairs cost nothing; if each row is one document, it runs in one call.
    """

    def __init__(self, document_ids: Tensor) -> None:
        batch, length = document_ids.shape
        first, self.positions = document_starts(document_ids)  # [B, T] each
        starts = first.flatten().nonzero().flatten().tolist()
        ends = [*starts[1:], batch * length]
        self._lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        self._whole_rows = len(starts) == batch

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._whole_rows:
            return causal_attention(q, k, v)
        batch, heads, length, head_dim = q.shape
        split = [
            x.transpose(0, 1).reshape(1, -1, batch * length, head_dim).split(self._lengths, dim=2)
            for x in (q, k, v)
        ]
        documents = [causal_attention(*document) for document in zip(*split, strict=True)]
        mixed = torch.cat(documents, dim=2)  # [1, H, B*T, head_dim]
        return mixed.reshape(heads, batch, length, head_dim).transpose(0, 1)


def document_starts(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """From ``document_ids`` int [B, T]: which tokens start a document, bool [B, T], and each token's position
    in its document, int64 [B, T]."""
    batch, length = document_ids.shape
    index = torch.arange(length, device=document_ids.device).expand(batch, length)  # [B, T]
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return first, index - torch.where(first, index, 0).cummax(dim=1).values
