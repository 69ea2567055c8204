"""The shape of a model: upstream's ``config.json`` keys as a strict dataclass, and the named shapes. Needs no
torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xverse.config import UserError, build, choose
from xverse.model.scaling import RopeScaling

# Parameters. On a CPU smaller models run in float32, which any CPU is fast at; larger ones may not fit.
FLOAT32_BELOW = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class XverseConfig:
    """Everything that determines the tensors of a model and the arithmetic of its forward pass."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 8192
    max_tokenizer_truncation: int = 6144
    pad_token_id: int = 1
    bos_token_id: int = 2
    eos_token_id: int = 3
    initializer_range: float = 0.02
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not split into {self.num_attention_heads} heads "
                "of an even size"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def context_length(self) -> int:
        """The longest text in tokens: ``max_position_embeddings``, extended by rope scaling."""
        if self.rope_scaling is None:
            return self.max_position_embeddings
        return self.rope_scaling.context_length(self.max_position_embeddings)

    def num_parameters(self) -> int:
        """Trainable parameters: untied embedding and head, no biases."""
        layer = 4 * self.hidden_size**2 + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return 2 * self.vocab_size * self.hidden_size + self.num_hidden_layers * layer + self.hidden_size

    def flops_per_token(self, length: int) -> dict[str, float]:
        """Training FLOPs per token, see ``training_flops``."""
        parameters = self.num_parameters() - self.vocab_size * self.hidden_size
        return training_flops(parameters, self.num_hidden_layers, self.hidden_size, length)

    def to_json(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """``config.json`` as upstream writes it, without ``auto_map``; ``dtype`` is that of the stored
        weights."""
        values = dataclasses.asdict(self)
        values.pop("rope_scaling")
        if self.rope_scaling is not None:
            values["rope_scaling"] = self.rope_scaling.to_json()
        return {
            "architectures": ["XverseForCausalLM"],
            "model_type": "xverse",
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": dtype,
            "use_cache": True,
            **values,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str = "config.json") -> XverseConfig:
        """Read ``config.json``, ignoring unknown keys as every reader of the format does.

        Raises UserError for a missing key or an unsupported architecture.
        """
        fixed = {
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
        }
        for key, supported in fixed.items():
            if values.get(key, supported) != supported:
                raise UserError(f"{where}: {key} = {values[key]!r} is not supported, only {supported!r}")
        heads = values.get("num_attention_heads")
        if values.get("num_key_value_heads", heads) != heads:
            raise UserError(f"{where}: grouped-query attention (num_key_value_heads) is not supported")
        known = {field.name for field in dataclasses.fields(cls)}
        kept = {key: value for key, value in values.items() if key in known and value is not None}
        rope = values.get("rope_parameters") or values.get("rope_scaling")
        kept.pop("rope_scaling", None)
        config = build(cls, kept, where)
        if not rope:
            return config
        scaling = RopeScaling.from_json(rope, config.max_position_embeddings, where)
        theta = kept.get("rope_theta", rope.get("rope_theta", cls.rope_theta))
        return dataclasses.replace(config, rope_theta=theta, rope_scaling=scaling)


def training_flops(parameters: int, layers: int, hidden_size: int, length: int) -> dict[str, float]:
    """Training FLOPs per token, forward and backward: 6 for each of ``parameters`` (without the embedding's)
    and those of attention over ``length`` tokens, counted "full" (12 · layers · d · T) or "causal" (half)."""
    attention = 12 * layers * hidden_size * length
    return {"full": 6 * parameters + attention, "causal": 6 * parameters + attention / 2}


def _shape(
    vocab: int, hidden: int, intermediate: int, layers: int, heads: int, context: int = 8192
) -> XverseConfig:
    return XverseConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
    )


SHAPES: dict[str, XverseConfig] = {
    "nano": _shape(12288, 256, 768, layers=6, heads=4),
    "mini": _shape(12288, 512, 1408, layers=8, heads=8),
    "7b": _shape(100534, 4096, 11008, layers=32, heads=32),
    "13b": _shape(100278, 5120, 13824, layers=40, heads=40),
    "13b-2": _shape(100534, 5120, 13824, layers=40, heads=40),
    "65b": _shape(100534, 8192, 22016, layers=80, heads=64, context=16384),
}


def named_shape(name: str) -> XverseConfig:
    """The configuration of a published or embedded shape; raises UserError for an unknown name."""
    return choose("shape", name, SHAPES)
