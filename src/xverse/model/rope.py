"""Rotary position embedding, half-rotation form (Su et al., 2021, arXiv:2104.09864), and its scalings for
contexts longer than those that a model was trained on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xverse.model.scaling import RopeScaling

if TYPE_CHECKING:
    from xverse.model.config import XverseConfig


def rope_tables(
    positions: Tensor, config: XverseConfig, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [B, 1, T, head_dim], for ``positions`` int64 [B, T].

    Computed from the positions in every forward pass: the cost is nothing beside one layer, there is no
    buffer to keep out of checkpoints, and no position is out of range. ``lengths`` int64, [B, T] or
    broadcast to it, is how long the text of each token may become, which "dynamic" scaling depends on;
    without it each row's last position counts.
    """
    scaling, theta, head_dim = config.rope_scaling, config.rope_theta, config.head_dim
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    # 1 / theta**x, as the reference has it: theta**-x rounds differently, and position 8,000 multiplies that.
    if scaling is not None and scaling.rope_type == "dynamic":
        if lengths is None:
            lengths = positions.amax(dim=-1, keepdim=True) + 1
        most = config.max_position_embeddings
        grown = scaling.factor * lengths.clamp(min=most).float() / most - (scaling.factor - 1)  # [B, T]
        base = theta * grown ** (head_dim / (head_dim - 2))
        frequencies = 1.0 / base[:, None, :, None] ** exponents  # [B, 1, T, head_dim/2]
    else:
        frequencies = 1.0 / theta**exponents  # [head_dim/2]
        if scaling is not None and scaling.rope_type == "linear":
            frequencies = frequencies / scaling.factor
        elif scaling is not None:
            frequencies = _yarn(frequencies, scaling, theta)
    angles = positions[:, None, :, None].float() * frequencies  # [B, 1, T, head_dim/2]
    angles = torch.cat((angles, angles), dim=-1)  # [B, 1, T, head_dim]
    if scaling is None or scaling.rope_type != "yarn":
        return angles.cos(), angles.sin()
    scale = scaling.attention_factor
    if scale is None:
        scale = 0.1 * math.log(scaling.factor) + 1.0
    return angles.cos() * scale, angles.sin() * scale


def _yarn(frequencies: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """Frequencies [head_dim/2] that turn less than ``beta_slow`` times in the original context are divided by
    the factor, those that turn more than ``beta_fast`` times stay, and between lies a ramp."""
    count = len(frequencies)
    context = scaling.original_max_position_embeddings
    assert context is not None

    def place(turns: float) -> float:
        return count * math.log(context / (turns * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(place(scaling.beta_fast)), 0)
    high = min(math.ceil(place(scaling.beta_slow)), 2 * count - 1)
    steps = torch.arange(count, device=frequencies.device, dtype=torch.float32)
    ramp = ((steps - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys [B, H, T, head_dim]; the tables are cast to ``x``'s dtype, as upstream does."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)
