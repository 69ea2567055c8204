"""The attention context over transformers' caches, with padding by ``attention_mask``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from xverse.kernels.training import KernelPacked
from xverse.model.attention import AttentionContext, Packed, attention


class CachedAttention:
    """New tokens attend to themselves and to the cache, but never to padding.

    ``attention_mask`` is [B, past + T] (0 = padding) or a ready mask [B, 1, T, K], bool or additive.
    ``position_ids`` [B, T] or [1, T]; without them positions count the tokens that are not padding, so
    that padding does not change a row's result. ``cache`` is any transformers ``Cache``, or None.
    """

    def __init__(
        self,
        batch: int,
        length: int,
        device: torch.device,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
    ) -> None:
        self.cache = cache
        self.past = 0 if cache is None else int(cache.get_seq_length())
        self.length = length
        self.padding: Tensor | None = None
        self.mask: Tensor | None = None
        self.ready = attention_mask is not None and attention_mask.dim() == 4
        if self.ready:
            self.mask = attention_mask
        elif attention_mask is not None:
            if attention_mask.shape != (batch, self.past + length):
                raise ValueError(
                    f"attention_mask is {list(attention_mask.shape)}, but there are {batch} rows of "
                    f"{self.past} cached and {length} new tokens"
                )
            seen = attention_mask.to(device=device, dtype=torch.bool)  # [B, past + T]
            self.padding = None if seen.all() else seen
        if position_ids is not None:
            self.positions = position_ids.to(device).expand(batch, length)  # [B, T]
        elif self.padding is not None:
            self.positions = (self.padding.long().cumsum(1) - 1).clamp(min=0)[:, self.past :]
        else:
            self.positions = torch.arange(self.past, self.past + length, device=device).expand(batch, length)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q``, ``k``, ``v`` [B, H, T, head_dim] → [B, H, T, head_dim]."""
        if self.cache is not None:
            k, v = self.cache.update(k, v, layer)  # [B, H, K, head_dim]; K exceeds past + T in a static cache
        if self.mask is None and not self.ready:
            self.mask = self._build_mask(k.shape[2], q.device)
            self.ready = True
        if self.mask is not None:
            # With device_map the layers are on several devices, and the mask has to follow.
            dtype = self.mask.dtype if self.mask.dtype == torch.bool else q.dtype
            self.mask = self.mask.to(device=q.device, dtype=dtype)
        return attention(q, k, v, self.mask, causal=self.mask is None and self.length > 1)

    def _build_mask(self, keys: int, device: torch.device) -> Tensor | None:
        """Bool [B or 1, 1, T, K], True for visible keys; None if plain causal attention suffices."""
        if self.padding is None and keys == self.past + self.length and (self.length == 1 or not self.past):
            return None
        key = torch.arange(keys, device=device)  # [K]
        query = torch.arange(self.past, self.past + self.length, device=device)[:, None]  # [T, 1]
        allowed = (key <= query)[None]  # [1, T, K]
        if self.padding is not None:
            # Unwritten slots of a static cache count as visible here; causality masks them.
            seen = pad(self.padding.to(device), (0, keys - self.padding.shape[1]), value=True)  # [B, K]
            # A padding token attends to itself: a row without any key is all NaN in some kernels.
            allowed = (allowed & seen[:, None]) | (key == query)  # [B, T, K]
        return allowed[:, None]


def attention_context(
    batch: int,
    length: int,
    device: torch.device,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Any,
    bounds: Tensor | None = None,
    longest: int | None = None,
) -> AttentionContext:
    """The context of one forward call. Positions that restart, without mask or cache, are packed documents
    (from padding-free collators), each of which attends only to itself. ``bounds`` int32 [n + 1], where they
    begin and end in a single row, and the ``longest`` one's length save finding them, and so waiting for a
    GPU."""
    if bounds is not None and position_ids is not None and attention_mask is None and cache is None:
        if device.type != "cpu" and longest is not None:
            return Packed.flattened(bounds.to(device), longest, position_ids.to(device))
        numbers = torch.arange(len(bounds) - 1, device=bounds.device)
        packed = KernelPacked(numbers.repeat_interleave(bounds.diff())[None])
        packed.positions = position_ids
        return packed
    if position_ids is not None and attention_mask is None and cache is None and length > 1:
        position_ids = position_ids.to(device).expand(batch, length)
        restarts = position_ids[:, 1:] <= position_ids[:, :-1]  # [B, T-1]
        if restarts.any():
            packed = KernelPacked(pad(restarts.cumsum(1), (1, 0)))
            packed.positions = position_ids
            return packed
    return CachedAttention(batch, length, device, attention_mask, position_ids, cache)
