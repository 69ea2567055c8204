"""AdamW and its learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn


def make_adamw(
    model: nn.Module, *, weight_decay: float, betas: tuple[float, float], eps: float = 1e-8
) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter, 2017); norm weights and the embedding are not decayed.

    The learning rate is set by the loop before every step.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = parameter.dim() == 1 or name.endswith("embed_tokens.weight")
            (plain if is_plain else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)


def cosine_lr(step: int, *, peak: float, warmup_steps: int, steps: int, final_ratio: float) -> float:
    """Linear warm-up to ``peak``, then a half cosine down to ``final_ratio`` · peak at the last step."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return peak * (final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
