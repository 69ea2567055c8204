"""Balance a weight's columns against their inputs before rounding; what the model computes stays the same.

An input channel with large weights spoils the scale of every group that it is in; one with large activations
spoils the scale of the int8 activations beside it. Whatever stands in front of a linear layer can take a
factor from its columns: the norm's weight for q, k and v, for gate and up, and for the head; the rows of v
for o (attention mixes tokens, not channels), the rows of up for down. Column and input are made equally
large, as in SmoothQuant (Xiao et al., 2022) with a migration strength of one half, but by root mean squares.
A model and the same model with rescaled channels thus become the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xverse.model.transformer import DecoderLayer, RMSNorm

_PART = 1 << 18  # weights at a time: what fits a second-level cache
_LEAST = 1e-3  # of the mean: smaller columns and inputs count as this, so that unused channels stay unused


@dataclass(frozen=True)
class InputSizes:
    """Root mean squares of the inputs of q, k and v [D], of o [D], of gate and up [D] and of down [d_ff]."""

    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor


def equalize_layer(layer: DecoderLayer, sizes: InputSizes) -> InputSizes:
    """Balances the weights of a decoder layer where they are, in float32; norms keep their type and are
    replaced. Returns the inputs' sizes after it."""
    attention, mlp = layer.self_attn, layer.mlp
    o = _balance_pair(attention.v_proj, attention.o_proj, sizes.o)
    down = _balance_pair(mlp.up_proj, mlp.down_proj, sizes.down)
    in_front = (attention.q_proj, attention.k_proj, attention.v_proj)
    qkv = _balance_norm(layer.input_layernorm, in_front, sizes.qkv)
    gate_up = _balance_norm(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), sizes.gate_up)
    return InputSizes(qkv, o, gate_up, down)


def split_norm(norm: Tensor, weights: Sequence[Tensor], sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For a norm's weight [K], the ``weights`` [N, K] behind it and the ``sizes`` [K] of their inputs: a new
    norm weight of the old one's type, what the columns are to be multiplied by, float32 [K], and the inputs'
    new sizes. Norm times column stays what it was: the factors are taken after the norm has been rounded."""
    new = (norm.float() / _factors(sizes, column_sizes(weights))).to(norm.dtype)
    factors = torch.where(new == 0, 1.0, norm.float() / new.float())
    return new, factors, sizes / factors


def column_sizes(weights: Sequence[Tensor]) -> Tensor:
    """The root mean square of each column over the rows of several weights [N, K], float32 [K]."""
    total = torch.zeros(weights[0].shape[1])
    for weight in weights:
        for part in weight.split(max(1, _PART // weight.shape[1])):
            total += part.float().square().sum(dim=0)
    return (total / sum(len(weight) for weight in weights)).sqrt()


def _factors(inputs: Tensor, columns: Tensor) -> Tensor:
    """What multiplies the columns, and divides the inputs, so that the two become equal up to a constant."""
    inputs, columns = (x.clamp(min=max(_LEAST * x.mean().item(), 1e-30)) for x in (inputs, columns))
    factors = (inputs / columns).sqrt()
    return factors / factors.log().mean().exp()


def _balance_norm(norm: RMSNorm, linears: Sequence[nn.Linear], sizes: Tensor) -> Tensor:
    new, factors, sizes = split_norm(norm.weight, [linear.weight for linear in linears], sizes)
    norm.weight = nn.Parameter(new, requires_grad=False)
    for linear in linears:
        linear.weight.mul_(factors)
    return sizes


def _balance_pair(first: nn.Linear, second: nn.Linear, sizes: Tensor) -> Tensor:
    """Factors move from the columns of ``second`` to the rows of ``first``."""
    factors = _factors(sizes, column_sizes([second.weight]))
    second.weight.mul_(factors)
    first.weight.div_(factors[:, None])
    return sizes / factors
