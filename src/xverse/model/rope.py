"""Rotary position embedding, half-rotation form (Su et al., 2021, arXiv:2104.09864), and its scalings for
contexts longer than those that a model was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xverse.config import build

if TYPE_CHECKING:
    from xverse.model.config import XverseConfig

KINDS = ("linear", "dynamic", "yarn")
_YARN_ONLY = ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """``factor`` is by how much the context grows, ``rope_type`` how.

    "linear" divides positions (Chen et al., 2023, arXiv:2306.15595), "dynamic" raises the base with the
    length of a text ("dynamic NTK"), "yarn" divides low frequencies more than high ones (Peng et al., 2023,
    arXiv:2309.00071).

    The last four are YaRN's. Raises ValueError for a value out of range.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        if self.rope_type not in KINDS:
            raise ValueError(f"rope_type '{self.rope_type}' is not supported, only {', '.join(KINDS)}")
        if not 1 <= self.factor <= 1000:
            raise ValueError(f"factor {self.factor} is out of range (1 to 1000)")
        if self.attention_factor is not None and not 0 < self.attention_factor <= 100:
            raise ValueError(f"attention_factor {self.attention_factor} is out of range (above 0, up to 100)")
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"beta_fast {self.beta_fast} is not above beta_slow {self.beta_slow}, or not above 0"
            )

    def to_json(self) -> dict[str, Any]:
        """As transformers reads it, under ``rope_scaling``."""
        values = asdict(self)
        if self.rope_type != "yarn":
            for name in _YARN_ONLY:
                del values[name]
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], positions: int, where: str) -> RopeScaling | None:
        """``rope_scaling`` of older files or ``rope_parameters`` of newer ones; None where nothing is scaled.

        ``positions`` is ``max_position_embeddings``. Raises UserError for a kind or a key that is unknown.
        """
        kind = values.get("rope_type", values.get("type", "default"))
        if kind in (None, "default"):
            return None
        kept = {key: value for key, value in values.items() if value is not None}
        kept = {key: value for key, value in kept.items() if key not in ("type", "rope_type", "rope_theta")}
        if kind == "yarn":
            kept.setdefault("original_max_position_embeddings", positions)
        elif kind in KINDS:
            for name in _YARN_ONLY:  # transformers writes some of them for every kind, to no effect
                kept.pop(name, None)
        return build(cls, {"rope_type": kind, **kept}, f"{where}: rope scaling")

    def context_length(self, positions: int) -> int:
        """How long a text may be, where ``positions`` is the configuration's ``max_position_embeddings``."""
        return int((self.original_max_position_embeddings or positions) * self.factor)


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
