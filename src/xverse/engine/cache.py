"""Keys and values of one request, and the attention contexts that read and write them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from xverse.model.config import XverseConfig

_FIRST_CAPACITY = 256


class SequenceCache:
    """Contiguous keys and values of one request, [1, H, capacity, head_dim] for each layer.

    The capacity doubles when it is used up, so a request that ends early never holds its longest size.
    """

    def __init__(self, config: XverseConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.length = 0
        self.capacity = 0
        self._limit = config.max_position_embeddings
        empty = torch.empty(1, config.num_attention_heads, 0, config.head_dim, dtype=dtype, device=device)
        self.keys = [empty] * config.num_hidden_layers
        self.values = [empty] * config.num_hidden_layers

    def reserve(self, length: int) -> None:
        """Make room for ``length`` positions in all."""
        assert length <= self._limit, f"{length} positions in a cache for {self._limit}"
        if length <= self.capacity:
            return
        self.capacity = min(max(length, 2 * self.capacity, _FIRST_CAPACITY), self._limit)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = old.new_empty(1, old.shape[1], self.capacity, old.shape[3])
                new[:, :, : self.length] = old[:, :, : self.length]
                tensors[layer] = new


class PrefillContext:
    """A chunk of ``length`` prompt tokens of one request, which see the cache before them and each other."""

    def __init__(self, cache: SequenceCache, length: int, device: torch.device) -> None:
        self._cache = cache
        self._start = cache.length
        self._end = cache.length + length
        cache.reserve(self._end)
        self.positions = torch.arange(self._start, self._end, device=device)[None]  # [1, T]
        self._mask: Tensor | None = None
        if self._start:
            key_positions = torch.arange(self._end, device=device)  # [S]
            self._mask = key_positions <= self.positions[0][:, None]  # [T, S]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys[:, :, self._start : self._end] = k
        values[:, :, self._start : self._end] = v
        if self._mask is None:
            return scaled_dot_product_attention(q, k, v, is_causal=True)
        before = slice(0, self._end)
        return scaled_dot_product_attention(q, keys[:, :, before], values[:, :, before], attn_mask=self._mask)


class DecodeContext:
    """One token of each of several requests: the linears run as one batch, attention row by row."""

    def __init__(self, caches: Sequence[SequenceCache], device: torch.device) -> None:
        self._caches = caches
        for cache in caches:
            cache.reserve(cache.length + 1)
        self.positions = torch.tensor([[cache.length] for cache in caches], device=device)  # [B, 1]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for row, cache in enumerate(self._caches):
            part, end = slice(row, row + 1), cache.length + 1
            keys = cache.keys[layer][:, :, :end]  # [1, H, S, head_dim]
            values = cache.values[layer][:, :, :end]
            keys[:, :, -1:] = k[part]
            values[:, :, -1:] = v[part]
            rows.append(scaled_dot_product_attention(q[part], keys, values))
        return rows[0] if len(rows) == 1 else torch.cat(rows)  # [B, H, 1, head_dim]
