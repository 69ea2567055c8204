"""The attention context over transformers' caches, masks and attention functions."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from xverse.kernels.training import KernelPacked
from xverse.model.attention import AttentionContext, Continued, Packed, attention

# Names that differ between versions of transformers 5.
_MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters
_EMBEDS = "inputs_embeds" if "inputs_embeds" in _MASK_ARGUMENTS else "input_embeds"
_CACHE = "cache" if "cache" in _MASK_ARGUMENTS else "past_key_values"
_UPDATE_TAKES_OPTIONS = "kwargs" in inspect.signature(Cache.update).parameters


def prepare(module: Any, config: Any, layer: int) -> None:
    """Give an attention module of the model the attributes that transformers' attention functions read."""
    values: dict[str, Any] = {
        "config": config,
        "layer_idx": layer,
        "is_causal": True,
        "num_key_value_groups": getattr(config, "num_attention_heads", 1)
        // getattr(config, "num_key_value_heads", getattr(config, "num_attention_heads", 1)),
        "scaling": module.head_dim**-0.5,
    }
    for name, value in values.items():
        setattr(module, name, value)


class InterfaceAttention:
    """Attention by the function that ``config._attn_implementation`` names, over any cache of transformers.

    ``x`` [B, T, D] are the embeddings. ``attention_mask`` is [B, past + T] (0 = padding) or a ready mask
    [B, 1, T, K], bool or additive. ``position_ids`` is [B, T] or [1, T]; the default continues the cache.
    ``options`` are passed to the attention function. ``weights`` receives [B, H, T, K] of each layer whose
    function computes them (eager).
    """

    def __init__(
        self,
        modules: Sequence[Any],
        config: Any,
        x: Tensor,
        attention_mask: Any,
        position_ids: Tensor | None,
        cache: Any,
        options: Mapping[str, Any],
    ) -> None:
        self._modules, self._cache = modules, cache
        self._plain = config._attn_implementation == "sdpa"
        self._causal = options.get("is_causal") is not False
        self._function = ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation, eager_attention_forward)
        self.weights: dict[int, Tensor] = {}
        batch, length = x.shape[:2]
        past = 0 if cache is None else cache.get_seq_length()
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            _check_mask(attention_mask, batch, length, cache)
        if position_ids is None:
            position_ids = (torch.arange(length, device=x.device) + past)[None]  # [1, T]
        position_ids = position_ids.to(x.device)
        self.positions = position_ids.expand(batch, length)  # [B, T]
        arguments = {
            "config": config,
            _EMBEDS: x,
            "attention_mask": attention_mask,
            _CACHE: cache,
            "position_ids": position_ids,
        }
        if "cache_position" in _MASK_ARGUMENTS:
            arguments["cache_position"] = torch.arange(length, device=x.device) + past
        self._mask: Any = create_causal_mask(**arguments)
        self._options = {**options, "position_ids": position_ids}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q``, ``k``, ``v`` [B, H, T, head_dim] → [B, H, T, head_dim]."""
        module, mask, options = self._modules[layer], self._mask, dict(self._options)
        if self._cache is not None:
            # The cache of continuous batching reads and changes the options of the attention function.
            more = {"kwargs": options} if _UPDATE_TAKES_OPTIONS or hasattr(self._cache, "allocators") else {}
            k, v = self._cache.update(k, v, layer, **more)  # [B, H, K, head_dim]
        if isinstance(mask, Tensor):
            # With device_map the layers are on several devices, and the mask has to follow.
            mask = mask.to(device=q.device, dtype=None if mask.dtype == torch.bool else q.dtype)
        if self._plain and q.device.type == "cuda" and not torch.compiler.is_compiling():
            return attention(q, k, v, mask, causal=mask is None and q.shape[2] > 1 and self._causal)
        output, weights = self._function(
            module, q, k, v, mask, dropout=0.0, scaling=module.scaling, **options
        )  # [B, T, H, head_dim]
        if weights is not None:
            self.weights[layer] = weights
        return output.transpose(1, 2)


def attention_context(
    modules: Sequence[Any],
    config: Any,
    x: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    cache: Any,
    options: Mapping[str, Any],
) -> AttentionContext:
    """The context of one forward call. Positions that restart, without mask or cache, are packed documents
    (from padding-free collators), each of which attends only to itself. With SDPA they are computed one by
    one, which costs less than a mask; ``cu_seq_lens_q`` int32 [n + 1], where they begin and end in a single
    row, and ``max_length_q`` save finding them, and so waiting for a GPU. With ``key_places`` some continue
    others, see ``Continued``. ``is_causal`` False, in the options or in ``config``, lets tokens attend to
    later ones, too."""
    causal = options.get("is_causal", getattr(config, "is_causal", None))
    if causal is not None:  # create_causal_mask reads it from the configuration
        config = copy.copy(config)
        config.is_causal = causal
        options = {**options, "is_causal": causal}
    batch, length = x.shape[:2]
    if position_ids is not None and "key_places" in options:
        q_ends, k_ends, places = (
            options[name].to(x.device) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "key_places")
        )
        most = options["max_length_q"], options["max_length_k"]
        return Continued(position_ids.to(x.device), q_ends, k_ends, places, most)
    plain = attention_mask is None and cache is None and causal is None and length > 1
    by_kernel = config._attn_implementation == "sdpa" and not torch.compiler.is_compiling()
    if position_ids is not None and plain and by_kernel:
        bounds, longest = options.get("cu_seq_lens_q"), options.get("max_length_q")
        position_ids = position_ids.to(x.device).expand(batch, length)
        if bounds is not None and batch == 1:
            if x.device.type != "cpu" and longest is not None:
                return Packed.flattened(bounds.to(x.device), longest, position_ids)
            numbers = torch.arange(len(bounds) - 1, device=bounds.device)
            documents = KernelPacked(numbers.repeat_interleave(bounds.diff())[None].to(x.device))
            documents.positions = position_ids
            return documents
        restarts = position_ids[:, 1:] <= position_ids[:, :-1]  # [B, T-1]
        if restarts.any():
            packed = KernelPacked(pad(restarts.cumsum(1), (1, 0)))
            packed.positions = position_ids
            return packed
    return InterfaceAttention(modules, config, x, attention_mask, position_ids, cache, options)


def _check_mask(mask: Tensor, batch: int, length: int, cache: Any) -> None:
    """Raise ValueError for a mask [B, past + T] with too few rows or columns. With a cache transformers
    pads or cuts it, which static caches and PEFT's prefixes rely on."""
    if torch.compiler.is_compiling():
        return  # lengths of static caches are tensors
    past = 0 if cache is None else int(cache.get_seq_length())
    if mask.shape[0] != batch or (not past and mask.shape[1] < length):
        raise ValueError(
            f"attention_mask is {list(mask.shape)}, but there are {batch} rows of {past} cached and {length} "
            "new tokens"
        )
