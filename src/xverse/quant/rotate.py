"""Rotate the residual stream before rounding, without changing what the model computes.

An RMS norm without a weight commutes with an orthogonal matrix. Its weight moves into the matrices behind it,
and all that reads or writes the stream is multiplied by one matrix, which mixes all channels equally (QuaRot:
Ashkboos et al., 2024). No channel is an outlier afterwards, and weights are nearly normally distributed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

_LARGEST = 64  # factors are at most this large: D (64 + 64) instead of D² products for D = 4,096
_NORMS = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "input_layernorm")
_NORMS |= dict.fromkeys(("gate_proj", "up_proj"), "post_attention_layernorm")
_WRITERS = ("o_proj", "down_proj")  # into the stream


def rotated(x: Tensor, norm: Tensor | None = None) -> Tensor:
    """``x`` [..., D], times ``norm`` [D], times the rotation, float32."""
    signs, factors = _factors(x.shape[-1])
    y = x.float() * signs.to(x.device)
    y = y if norm is None else y * norm
    for factor in factors:  # each takes the first remaining axis, which becomes the last
        y = y.reshape(-1, len(factor), len(signs) // len(factor)).transpose(1, 2) @ factor.to(x.device)
    return y.reshape(x.shape)


def rotated_layer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a decoder layer, by full name, in a rotated stream: float32, norms of the stream 1."""
    by_module = {name.split(".")[-2]: tensor for name, tensor in tensors.items()}
    result = dict(tensors)
    for name, tensor in tensors.items():
        module, kind = name.split(".")[-2:]
        if module in _WRITERS:
            result[name] = rotated(tensor.T).T.contiguous() if tensor.dim() == 2 else rotated(tensor)
        elif module in _NORMS and kind == "weight":
            result[name] = rotated(tensor, by_module[_NORMS[module]])
        elif module in _NORMS.values():
            result[name] = torch.ones_like(tensor)
    return result


@functools.cache
def _factors(size: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Signs [D] and orthogonal matrices, whose Kronecker product is the rotation: Hadamard's for powers of
    two, a random one for what remains."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (size,), generator=generator) * 2.0 - 1
    power = size & -size
    factors = [torch.linalg.qr(torch.randn(size // power, size // power, generator=generator))[0]]
    while power > 1:
        factor = torch.ones(1, 1)
        while len(factor) < min(power, _LARGEST):
            factor = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5, factor)
        factors.append(factor)
        power //= len(factor)
    return signs, tuple(factors)
