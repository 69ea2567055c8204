"""All decoder layers of a model in one call of a kernel, for few tokens (``csrc/fused_step.cpp``)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from xverse.kernels.inference import BF16Linear, InvariantLinear
from xverse.kernels.linear import QuantLinear
from xverse.kernels.lora import bounds_of, pointers
from xverse.kernels.native import TYPES, Layer, Lora, Weight, call, library
from xverse.kernels.ops import BF16_TOKENS
from xverse.kernels.paged_attention import PagedLayer
from xverse.kernels.tiles import tile_format, tile_groups
from xverse.model.attention import AttentionContext
from xverse.model.transformer import XverseForCausalLM

_MOST_TOKENS = 64  # with more, the time between the products is negligible

LINEARS = {name: f"self_attn.{name}_proj" for name in "qkvo"}
LINEARS |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}

# An adapter's factors of all layers, in the order of LINEARS, and the tokens that it applies to.
Adapted = tuple["ctypes.Array[Lora]", tuple[int, int]]


class SingleQueries(AttentionContext, Protocol):
    """Tokens [1, N], each an independent query: ``slots`` int64 [N] in the cache for its key and value;
    ``table`` int32 [N, blocks] and ``lengths`` int32 [N] as for ``PagedLayer.attend``."""

    slots: Tensor
    table: Tensor
    lengths: Tensor


class FusedStep:
    """The layers of one model over one paged cache.

    Gives the same bits as the model's own forward pass: it calls the same kernels one after the other. The
    model's tensors and the cache must not move.
    """

    def __init__(self, model: XverseForCausalLM, cache: Sequence[PagedLayer], most_tokens: int) -> None:
        config = model.config
        self.most_tokens = most_tokens
        self._eps = config.rms_norm_eps
        self._heads, self._sizes = config.num_attention_heads, (config.hidden_size, config.intermediate_size)
        # Values for each token: see xv_fused_step.
        self._room = 2 * (config.hidden_size + config.attention_size + config.kv_size)
        self._room += 3 * config.intermediate_size
        self._norm_type = TYPES[model.model.norm.weight.dtype]
        self._layers = (Layer * len(cache))()
        self._model = model.model
        self._kept_alive = [model.state_dict(), cache]  # the structs point to their memory
        for number, (struct, pages) in enumerate(zip(self._layers, cache, strict=True)):
            layer = model.get_submodule(f"model.layers.{number}")
            for name, path in LINEARS.items():
                setattr(struct, name, _weight(layer.get_submodule(path)))
            struct.attention_norm = layer.get_parameter("input_layernorm.weight").data_ptr()
            struct.mlp_norm = layer.get_parameter("post_attention_layernorm.weight").data_ptr()
            struct.cache = pages.address

    def __call__(self, tokens: Tensor, context: SingleQueries, adapters: Sequence[Adapted] = ()) -> Tensor:
        """``tokens`` int64 [N] → normed hidden states [N, D]."""
        assert len(tokens) <= self.most_tokens
        x = self._model.embed_tokens(tokens)  # [N, D], a new tensor
        cos, sin = self._model.rope(context, x.dtype)  # [1, 1, N, head_dim]
        hidden, intermediate = self._sizes
        buffer = x.new_empty(len(x) * self._room)
        call(
            "xv_fused_step", self._layers, len(self._layers), x, cos, sin, context.slots, context.table,
            context.lengths, buffer, TYPES[x.dtype], self._norm_type, len(x), hidden, intermediate,
            self._heads, context.table.stride(0), self._eps, pointers([table for table, _ in adapters]),
            len(adapters), bounds_of([segment for _, segment in adapters]) if adapters else None,
        )  # fmt: skip
        return self._model.norm(x)


def fused_step(model: XverseForCausalLM, cache: Sequence[PagedLayer]) -> FusedStep | None:
    """The fused step of ``model``, or None unless kernels compute all of its layers and its cache."""
    dtype = model.model.norm.weight.dtype
    if library() is None or dtype not in TYPES or model.config.qk_norm or model.config.num_experts:
        return None
    if any(pages.address is None or pages.keys.dtype not in (dtype, torch.int8) for pages in cache):
        return None
    most_tokens = _MOST_TOKENS
    for layer in model.model.layers:
        for path in LINEARS.values():
            module = layer.get_submodule(path)
            if module.bias is not None:
                return None
            if type(module) is InvariantLinear:
                if module.weight.dtype != dtype:
                    return None
            elif type(module) is BF16Linear:
                most_tokens = BF16_TOKENS
            elif (  # such as one with an adapter
                type(module) is not QuantLinear or module.order is not None or module.centres is not None
            ):
                return None
    return FusedStep(model, cache, most_tokens)


def _weight(module: nn.Module) -> Weight:
    if isinstance(module, QuantLinear):
        group = tile_groups(module.tiles, module.bits, module.table_group)[1]
        form = tile_format(module.bits, module.table_group)
        return Weight(module.tiles.data_ptr(), module.out_features, form, group)
    assert isinstance(module, BF16Linear | InvariantLinear)
    return Weight(module.weight.data_ptr(), module.out_features, 0, 0)
