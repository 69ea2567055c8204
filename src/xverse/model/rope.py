"""Rotary position embedding, half-rotation form (Su et al., 2021, arXiv:2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [B, 1, T, head_dim], for ``positions`` int64 [B, T].

    Computed from the positions in every forward pass: the cost is nothing beside one layer, there is no
    buffer to keep out of checkpoints, and no position is out of range.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    # 1 / theta**x, as the reference has it: theta**-x rounds differently, and position 8,000 multiplies that.
    frequencies = 1.0 / theta**exponents  # [head_dim/2]
    angles = positions[:, None, :, None].float() * frequencies  # [B, 1, T, head_dim/2]
    angles = torch.cat((angles, angles), dim=-1)  # [B, 1, T, head_dim]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys [B, H, T, head_dim]; the tables are cast to ``x``'s dtype, as upstream does."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)
