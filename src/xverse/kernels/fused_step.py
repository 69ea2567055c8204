"""A model's layers for a few tokens at a time in one call of our kernels (``csrc/decoder.cpp``)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from xverse.kernels.inference import BF16Linear
from xverse.kernels.linear import QuantLinear
from xverse.kernels.native import library
from xverse.kernels.ops import BF16_TOKENS
from xverse.kernels.paged_attention import PagedLayer
from xverse.kernels.tiles import tile_group_size
from xverse.model.attention import AttentionContext
from xverse.model.transformer import XverseForCausalLM

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_MOST_TOKENS = 64  # with more the products take so long that nothing else matters


_LINEARS = {name: f"self_attn.{name}_proj" for name in "qkvo"}
_LINEARS |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}


class SingleQueries(AttentionContext, Protocol):
    """Tokens [1, N] that are a query of their own each: ``slots`` int64 [N], where the cache takes them;
    ``table`` int32 [N, blocks] and ``lengths`` int32 [N] as for ``PagedLayer.attend``."""

    slots: Tensor
    table: Tensor
    lengths: Tensor


class _Weight(ctypes.Structure):
    """``Weight`` of csrc/decoder.cpp."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("bits", ctypes.c_int),
        ("group", ctypes.c_int),
    )


class _Layer(ctypes.Structure):
    """``Layer`` of csrc/decoder.cpp."""

    _fields_ = (
        *((name, _Weight) for name in _LINEARS),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "cache")),
    )


class FusedStep:
    """The layers of one model over one paged cache.

    Gives the same bits as the model's own forward pass: the same kernels, called one after the other. The
    model's tensors and the cache have to stay where they are.
    """

    def __init__(self, model: XverseForCausalLM, cache: Sequence[PagedLayer], most_tokens: int) -> None:
        config = model.config
        self.most_tokens = most_tokens
        self._eps = config.rms_norm_eps
        self._heads, self._sizes = config.num_attention_heads, (config.hidden_size, config.intermediate_size)
        self._norm_type = _TYPES[model.model.norm.weight.dtype]
        self._layers = (_Layer * len(cache))()
        self._model = model.model
        self._kept = [model.state_dict(), cache]  # whose memory is pointed at
        for number, (found, pages) in enumerate(zip(self._layers, cache, strict=True)):
            layer = model.get_submodule(f"model.layers.{number}")
            for name, path in _LINEARS.items():
                setattr(found, name, _weight(layer.get_submodule(path)))
            found.attention_norm = layer.get_parameter("input_layernorm.weight").data_ptr()
            found.mlp_norm = layer.get_parameter("post_attention_layernorm.weight").data_ptr()
            found.cache = pages.address

    def __call__(self, tokens: Tensor, context: SingleQueries) -> Tensor:
        """``tokens`` int64 [N] → normed hidden states [N, D]."""
        kernels = library()
        assert kernels is not None
        assert len(tokens) <= self.most_tokens
        x = self._model.embed_tokens(tokens)  # [N, D], ours to change
        cos, sin = self._model.rope(context, x.dtype)  # [1, 1, N, head_dim]
        hidden, intermediate = self._sizes
        buffer = x.new_empty(len(x) * (6 * hidden + 3 * intermediate))
        kernels.xv_decoder(
            self._layers, len(self._layers), x.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            context.slots.data_ptr(), context.table.data_ptr(), context.lengths.data_ptr(), buffer.data_ptr(),
            _TYPES[x.dtype], self._norm_type, len(x), hidden, intermediate, self._heads,
            context.table.stride(0), self._eps, torch.get_num_threads(),
        )  # fmt: skip
        return self._model.norm(x)


def fused_step(model: XverseForCausalLM, cache: Sequence[PagedLayer]) -> FusedStep | None:
    """A decoder for ``model``, where kernels compute all of its layers and its cache; None elsewhere."""
    dtype = model.model.norm.weight.dtype
    if library() is None or dtype not in _TYPES:
        return None
    if any(pages.address is None or pages.keys.dtype not in (dtype, torch.int8) for pages in cache):
        return None
    most = _MOST_TOKENS
    for layer in model.model.layers:
        for path in _LINEARS.values():  # an adapter beside one of them is none of these kinds
            module = layer.get_submodule(path)
            if type(module) is BF16Linear:
                most = BF16_TOKENS
            elif type(module) is not QuantLinear or module.order is not None:
                return None
    return FusedStep(model, cache, most)


def _weight(module: nn.Module) -> _Weight:
    if isinstance(module, QuantLinear):
        group = tile_group_size(module.tiles, module.bits)
        return _Weight(module.tiles.data_ptr(), module.out_features, module.bits, group)
    assert isinstance(module, BF16Linear)
    return _Weight(module.weight.data_ptr(), module.out_features, 16, 0)
