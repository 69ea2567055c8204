"""Rope scaling: how a model's context extends beyond that of training. Needs no torch, since commands that
read configurations must start fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from xverse.config import build

# Each kind's keys besides ``factor``.
KINDS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": (),
    "yarn": (
        *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
# The base is a key of the configuration too; YaRN's publishers write "finetuned", without effect.
_NOT_OWN = ("type", "rope_type", "rope_theta", "finetuned")
_OWN_KEYS = frozenset(key for keys in KINDS.values() for key in keys)


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """``factor`` is how much the context grows, ``rope_type`` the method.

    "linear" divides positions (Chen et al., 2023, arXiv:2306.15595), "dynamic" raises the base with the
    length of a text ("dynamic NTK"), "yarn" divides low frequencies more than high ones (Peng et al., 2023,
    arXiv:2309.00071), "llama3" does so between two wavelengths (Llama 3.1's modelling code).

    ``KINDS`` lists which of the other values each method uses. Raises ValueError for one out of range.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

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
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} is not above low_freq_factor "
                f"{self.low_freq_factor}, or not above 0"
            )

    def to_json(self) -> dict[str, Any]:
        """The value of ``rope_scaling`` as transformers reads it."""
        own = ("rope_type", "factor", *KINDS[self.rope_type])
        values = {name: value for name, value in asdict(self).items() if name in own and value is not None}
        if self.truncate:  # which older versions do not know
            values.pop("truncate", None)
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any], positions: int, where: str) -> RopeScaling | None:
        """From ``rope_scaling`` of older files or ``rope_parameters`` of newer ones; None without scaling.

        ``positions`` is ``max_position_embeddings``. Raises UserError for an unknown kind or key.
        """
        kind = str(values.get("rope_type", values.get("type", "default")))
        if kind in ("None", "default"):
            return None
        kept = {key: value for key, value in values.items() if value is not None}
        kept = {key: value for key, value in kept.items() if key not in _NOT_OWN}
        if kind not in KINDS:  # refuse it, rather than its keys
            kept = {"factor": 1.0}
        own = KINDS.get(kind, ())
        if "original_max_position_embeddings" in own:
            kept.setdefault("original_max_position_embeddings", positions)
        # transformers writes some of the others for every kind, without effect.
        kept = {key: value for key, value in kept.items() if key in own or key not in _OWN_KEYS}
        return build(cls, {"rope_type": kind, **kept}, f"{where}: rope scaling")

    def context_length(self, positions: int) -> int:
        """The longest text in tokens, given the configuration's ``max_position_embeddings``."""
        extended = int((self.original_max_position_embeddings or positions) * self.factor)
        return positions if self.rope_type == "llama3" else extended
