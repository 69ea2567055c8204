"""The difference between two models: max |Δlogit| over a fixed batch, computed in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from xverse.kernels.linear import QuantEmbedding
from xverse.model import FullCausal, XverseForCausalLM

BATCH, LENGTH = 2, 64
TOLERANCE = 1e-4  # between two float32 implementations of the same arithmetic


def fixed_tokens(vocab_size: int) -> Tensor:
    """The batch of every parity figure: int64 [2, 64], uniform over the vocabulary, seed 0."""
    return torch.randint(vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits, float32 [B, T, V], of any causal model for ``tokens`` int64 [B, T], computed in float32.

    16-bit weights are widened one module at a time, so that a 7B model needs no float32 copy.
    """
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    with _float32(model):
        if isinstance(model, XverseForCausalLM):
            batch, length = tokens.shape
            out: Tensor = model(tokens, FullCausal(batch, length, device))
        else:
            out = model(input_ids=tokens, use_cache=False).logits
    return out.float().cpu()  # [B, T, V]


def difference(expected: Tensor, model: nn.Module) -> float:
    """max |Δlogit| of a model against the ``expected`` logits [B, T, V] of ``fixed_tokens``."""
    return (expected - logits(model, fixed_tokens(expected.shape[-1]))).abs().max().item()


def parity(model_a: nn.Module, model_b: nn.Module) -> float:
    """max |Δlogit| between two models with the same vocabulary, this package's or transformers'."""
    config: Any = model_a.config
    tokens = fixed_tokens(config.vocab_size)
    return (logits(model_a, tokens) - logits(model_b, tokens)).abs().max().item()


@contextlib.contextmanager
def _float32(model: nn.Module) -> Iterator[None]:
    stored: dict[nn.Parameter, Tensor] = {}
    embeddings = [module for module in model.modules() if isinstance(module, QuantEmbedding)]
    types = [module.dtype for module in embeddings]

    def widen(module: nn.Module, _arguments: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.dtype != torch.float32:
                stored[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def restore(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in stored:
                parameter.data = stored.pop(parameter)

    hooks = []
    for embedding in embeddings:
        embedding.dtype = torch.float32
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            hooks.append(module.register_forward_pre_hook(widen))
            hooks.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for embedding, dtype in zip(embeddings, types, strict=True):
            embedding.dtype = dtype
