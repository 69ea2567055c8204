"""Rotary position embedding, half-rotation form (Su et al., 2021, arXiv:2104.09864), and its scalings beyond
the context length of training."""

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

    Computed from the positions in every forward pass: this costs little next to one layer, needs no buffer
    that checkpoints must exclude, and has no maximum position. "dynamic" scaling depends on ``lengths``
    int64, [B, T] or broadcast to it: the final length of each token's text (default: the row's last
    position + 1).
    """
    scaling, theta, head_dim = config.rope_scaling, config.rope_theta, config.head_dim
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    # 1 / theta**x as in the reference: theta**-x rounds differently, and position 8,000 magnifies that.
    if scaling is not None and scaling.rope_type == "dynamic":
        if lengths is None:
            lengths = positions.amax(dim=-1, keepdim=True) + 1
        most = config.max_position_embeddings
        grown = scaling.factor * lengths.clamp(min=most).float() / most - (scaling.factor - 1)  # [B, T]
        base = theta * grown ** (head_dim / (head_dim - 2))
        frequencies = 1.0 / base[:, None, :, None] ** exponents  # [B, 1, T, head_dim/2]
    else:
        frequencies = scaled_frequencies(1.0 / theta**exponents, scaling, theta)  # [head_dim/2]
    angles = positions[:, None, :, None].float() * frequencies  # [B, 1, T, head_dim/2]
    angles = torch.cat((angles, angles), dim=-1)  # [B, 1, T, head_dim]
    if scaling is None or scaling.rope_type != "yarn":
        return angles.cos(), angles.sin()
    scale = scaling.attention_factor
    if scale is None:
        logarithm = 0.1 * math.log(scaling.factor)
        scale = logarithm + 1.0
        if scaling.mscale and scaling.mscale_all_dim:
            scale = (scaling.mscale * logarithm + 1.0) / (scaling.mscale_all_dim * logarithm + 1.0)
    return angles.cos() * scale, angles.sin() * scale


def scaled_frequencies(frequencies: Tensor, scaling: RopeScaling | None, theta: float) -> Tensor:
    """The rotary frequencies [head_dim/2] under a scaling that does not depend on the text's length."""
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "llama3":
        return _llama3(frequencies, scaling)
    return _yarn(frequencies, scaling, theta)


def _yarn(frequencies: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """Divide frequencies [head_dim/2] with less than ``beta_slow`` turns in the original context by the
    factor, keep those with more than ``beta_fast`` turns, and interpolate between, as in YaRN."""
    count = len(frequencies)
    context = scaling.original_max_position_embeddings
    assert context is not None

    def place(turns: float) -> float:
        return count * math.log(context / (turns * 2 * math.pi)) / math.log(theta)

    low, high = place(scaling.beta_fast), place(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * count - 1)
    steps = torch.arange(count, device=frequencies.device, dtype=torch.float32)
    ramp = ((steps - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide frequencies [head_dim/2] with less than ``low_freq_factor`` turns in the original context by the
    factor, keep those with more than ``high_freq_factor`` turns, and interpolate between, as Llama 3.1."""
    assert scaling.original_max_position_embeddings is not None
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # [head_dim/2]
    return frequencies / scaling.factor * (1 - kept) + frequencies * kept


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys [B, H, T, head_dim] by tables [B, 1, T, head_dim], cast to ``x``'s dtype as
    upstream does."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)
