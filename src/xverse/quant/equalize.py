"""Balance a weight's columns against their inputs before rounding, without changing what the model computes.

An input channel with large weights coarsens the scale of every group that contains it; one with large
activations coarsens the scale of the int8 activations in its group. What precedes a linear layer can absorb a
factor of its columns: the norm's weight for q, k and v, for gate and up, and for the head; the rows of v for
o (attention mixes tokens, not channels), the rows of up for down. Column and input get the same magnitude, as
in SmoothQuant (Xiao et al., 2022) with a migration strength of one half, but measured by root mean squares.
Models that differ only in the scale of their channels thus become the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xverse.model.mlp import RoutedMLP
from xverse.model.transformer import DecoderLayer, RMSNorm

_PART = 1 << 18  # weights at a time: what fits in the L2 cache
_FLOOR = 1e-3  # of the mean; smaller columns and inputs count as this, so that unused channels stay unused


@dataclass(frozen=True)
class InputRMS:
    """Root mean squares float32 of the inputs of q, k and v [D], o [D], gate and up [D], and of each
    ``down_proj`` [d_ff], by name."""

    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    downs: dict[str, Tensor]


def equalize_layer(layer: DecoderLayer, inputs: InputRMS) -> tuple[InputRMS, Tensor]:
    """Balances the float32 weights of a decoder layer in place; replaces its norms, which keep their dtype.
    Returns the root mean squares of the inputs afterwards and the factors by which the outputs of v were
    divided. Experts keep the norm before them, which the router shares."""
    attention, mlp = layer.self_attn, layer.mlp
    o, values = _balance_values(attention.v_proj, attention.o_proj, inputs.o, attention.head_dim)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    qkv = _balance_norm(layer.input_layernorm, projections, inputs.qkv)
    networks: list[tuple[str, Any]] = [
        (name, layer.get_submodule(name.rpartition(".")[0])) for name in inputs.downs
    ]
    down = {name: _balance_pair(one.up_proj, one.down_proj, inputs.downs[name]) for name, one in networks}
    if isinstance(mlp, RoutedMLP):
        return InputRMS(qkv, o, inputs.gate_up, down), values
    gate_up = _balance_norm(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), inputs.gate_up)
    return InputRMS(qkv, o, gate_up, down), values


def split_norm(norm: Tensor, weights: Sequence[Tensor], rms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For a norm's weight [K], the ``weights`` [N, K] after it and the ``rms`` [K] of their inputs: a new
    norm weight of the old one's dtype, the factors float32 [K] for the columns, and the new root mean squares
    [K]. Norm times column does not change: the factors are computed from the rounded norm."""
    new = (norm.float() / equal_factors(rms, column_rms(weights))).to(norm.dtype)
    factors = torch.where(new == 0, 1.0, norm.float() / new.float())
    return new, factors, rms / factors


def column_rms(weights: Sequence[Tensor]) -> Tensor:
    """The root mean square of each column over the rows of several weights [N, K], float32 [K]."""
    total = torch.zeros(weights[0].shape[1], device=weights[0].device)
    for weight in weights:
        for part in weight.split(max(1, _PART // weight.shape[1])):
            total += part.float().square().sum(dim=0)
    return (total / sum(len(weight) for weight in weights)).sqrt()


def equal_factors(inputs: Tensor, columns: Tensor) -> Tensor:
    """Factors [K] that make columns times factors and inputs divided by factors equal up to a constant."""
    inputs, columns = (x.clamp(min=max(_FLOOR * x.mean().item(), 1e-30)) for x in (inputs, columns))
    factors = (inputs / columns).sqrt()
    return factors / factors.log().mean().exp()


def _balance_norm(norm: RMSNorm, linears: Sequence[nn.Linear], rms: Tensor) -> Tensor:
    new, factors, rms = split_norm(norm.weight, [linear.weight for linear in linears], rms)
    norm.weight = nn.Parameter(new, requires_grad=False)
    for linear in linears:
        linear.weight.mul_(factors)
    return rms


def _balance_values(
    v_proj: nn.Linear, o_proj: nn.Linear, rms: Tensor, head_dim: int
) -> tuple[Tensor, Tensor]:
    """As ``_balance_pair``, and the factors; the columns of ``o_proj`` whose query heads share a value head
    share one."""
    shape = (len(v_proj.weight) // head_dim, -1, head_dim)  # [KV, group, head_dim]

    def shared(x: Tensor) -> Tensor:
        return x.view(shape).square().mean(dim=1).sqrt().flatten()  # [KV · head_dim]

    factors = equal_factors(shared(rms), shared(column_rms([o_proj.weight])))
    columns = (
        factors.view(shape[0], 1, head_dim).expand(-1, len(rms) // len(factors), -1).flatten()
    )  # [H · head_dim]
    o_proj.weight.mul_(columns)
    v_proj.weight.div_(factors[:, None])
    if v_proj.bias is not None:
        v_proj.bias.div_(factors)
    return rms / columns, factors


def _balance_pair(first: nn.Linear, second: nn.Linear, rms: Tensor) -> Tensor:
    """Moves factors from the columns of ``second`` to the rows of ``first``."""
    factors = equal_factors(rms, column_rms([second.weight]))
    second.weight.mul_(factors)
    first.weight.div_(factors[:, None])
    return rms / factors
