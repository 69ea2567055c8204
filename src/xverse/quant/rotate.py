"""Rotate the residual stream before rounding, without changing what the model computes.

An RMS norm without a weight commutes with an orthogonal matrix. Its weight moves into the matrices behind it;
all that reads or writes the stream is then multiplied by one matrix, which mixes all channels with weights of
nearly the same size (QuaRot: Ashkboos et al., 2024). No channel stands out afterwards, and the weights of a
group are nearly normally distributed, as the tables are made for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

_LARGEST = 64  # factors are at most this large: D (64 + 64) instead of D² products for D = 4,096
_NORMS = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj"),
    "post_attention_layernorm": ("gate_proj", "up_proj"),
}
_WRITERS = ("o_proj", "down_proj")  # into the stream


def rotated(x: Tensor, norm: Tensor | None = None) -> Tensor:
    """``x`` [..., D] times the rotation, float32; ``norm`` [D] is multiplied into ``x`` first."""
    size = x.shape[-1]
    signs, factors = _factors(size)
    y = x.float() * signs.to(x.device)
    if norm is not None:
        y *= norm
    for factor in factors:  # each takes the first remaining axis, which becomes the last
        y = y.reshape(-1, len(factor), size // len(factor)).transpose(1, 2) @ factor.to(x.device)
    return y.reshape(x.shape)


def rotated_layer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a decoder layer, by full name, in a rotated stream: float32, norms of the stream 1."""
    result = dict(tensors)
    norms = {}
    for name, tensor in tensors.items():
        module = name.split(".")[-2]
        if module in _NORMS:
            result[name] = torch.ones_like(tensor)
            norms |= dict.fromkeys(_NORMS[module], tensor.float())
    for name, tensor in tensors.items():
        module, kind = name.split(".")[-2:]
        if module in _WRITERS:
            result[name] = rotated(tensor.T).T.contiguous() if tensor.dim() == 2 else rotated(tensor)
        elif module in norms and kind == "weight":
            result[name] = rotated(tensor, norms[module])
    return result


@functools.cache
def _factors(size: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Signs [D] and orthogonal matrices, whose Kronecker product is the rotation: those of Hadamard for
    powers of two, a random one for what remains."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (size,), generator=generator) * 2.0 - 1
    power = size & -size
    factors = []
    if power < size:
        factors.append(torch.linalg.qr(torch.randn(size // power, size // power, generator=generator))[0])
    while power > 1:
        hadamard = torch.ones(1, 1)
        while len(hadamard) < min(power, _LARGEST):
            hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5, hadamard)
        factors.append(hadamard)
        power //= len(hadamard)
    return signs, tuple(factors)
