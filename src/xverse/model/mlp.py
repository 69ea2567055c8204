"""The feed-forward networks: SwiGLU, and routed experts that are SwiGLU each (XVERSE-MoE)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from xverse.model.config import XverseConfig


def apply_all(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Several layers of one input [..., D]. Layer classes with ``together`` compute them at once."""
    kind = type(layers[0])
    if hasattr(kind, "together") and all(type(layer) is kind for layer in layers):
        return kind.together(layers, x)
    return [layer(x) for layer in layers]


class _Undrawn(nn.Linear):
    def reset_parameters(self) -> None:
        pass


def make_linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    """``nn.Linear``, on the meta device without drawing values, which takes seconds for thousands."""
    if torch.get_default_device().type != "meta":
        return nn.Linear(inputs, outputs, bias=bias)
    layer: nn.Linear = _Undrawn(inputs, outputs, bias=bias)
    layer.__class__ = nn.Linear
    return layer


class MLP(nn.Module):
    """The feed-forward network, SwiGLU (Shazeer, 2020, arXiv:2002.05202), of the configuration's width or of
    ``width``."""

    def __init__(self, config: XverseConfig, width: int | None = None) -> None:
        super().__init__()
        width = width or config.intermediate_size
        self.gate_proj = make_linear(config.hidden_size, width)
        self.up_proj = make_linear(config.hidden_size, width)
        self.down_proj = make_linear(width, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        gate, up = apply_all((self.gate_proj, self.up_proj), x)  # [..., d_ff] each
        return self.down_proj(self.activate(gate, up))

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) · up, [..., d_ff] each."""
        return silu(gate) * up


class RoutedMLP(nn.Module):
    """Experts of which a token activates ``moe_top_k``, besides shared ones that every token activates.

    The router's softmax is over all experts. The weights of the chosen ones are used as they are, unless
    ``norm_topk_prob`` scales them to a sum of 1. Shared experts are one network, as wide as all of them.
    """

    def __init__(self, config: XverseConfig) -> None:
        super().__init__()
        self.count, self.normalised = config.moe_top_k, config.norm_topk_prob
        self.router = make_linear(config.hidden_size, config.num_experts)
        self.experts = nn.ModuleList(MLP(config) for _ in range(config.num_experts))
        shared = config.num_shared_experts * config.intermediate_size
        self.shared_experts = MLP(config, shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]. Weights of experts that no token activates are not read."""
        rows = x.flatten(0, -2)  # [N, D]
        weights, chosen = self.route(rows)  # [N, k] each
        if len(rows) == 1:
            mixed = self._one(rows, weights[0], chosen[0].tolist())
        else:
            mixed = torch.zeros_like(rows, dtype=torch.float32)
            for expert, tokens, place in self._by_expert(chosen):
                part = self.experts[expert](rows[tokens]) * weights.flatten()[place, None]
                mixed = mixed.index_add(0, tokens, part.float())
            if self.shared_experts is not None:
                mixed = mixed + self.shared_experts(rows)
        return mixed.to(x.dtype).view(x.shape)

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``rows`` [N, D] → the weights float32 and the numbers int64 of each row's experts, [N, k]."""
        logits = self.router(rows.to(self.router.weight.dtype))  # never quantised, unlike the embedding
        shares = torch.softmax(logits, dim=-1, dtype=torch.float32)  # [N, experts]
        weights, chosen = shares.topk(self.count, dim=-1)
        if self.normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, chosen

    def _by_expert(self, chosen: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each activated expert with the rows that it gets, int64 [n], and their places in the flattened
        ``chosen`` int64 [N, k]: one product per matrix and expert."""
        flat = chosen.flatten()
        places = flat.argsort(stable=True)
        counts = flat.bincount(minlength=len(self.experts)).tolist()
        for expert, part in enumerate(places.split(counts)):
            if len(part):
                yield expert, part // self.count, part

    def _one(self, row: Tensor, weights: Tensor, chosen: list[int]) -> Tensor:
        """A single row [1, D] with its ``weights`` [k], as in decoding: the first products of all activated
        experts share their input and are computed in one call."""
        active: list[Any] = [self.experts[expert] for expert in chosen]
        if self.shared_experts is not None:
            active.append(self.shared_experts)
        firsts = [layer for mlp in active for layer in (mlp.gate_proj, mlp.up_proj)]
        products = iter(apply_all(firsts, row))
        parts = [mlp.down_proj(mlp.activate(next(products), next(products))).float() for mlp in active]
        routed = torch.cat(parts[: len(chosen)])  # [k, D]
        mixed = (weights[:, None] * routed).sum(dim=0, keepdim=True)
        return mixed if self.shared_experts is None else mixed + parts[-1]
