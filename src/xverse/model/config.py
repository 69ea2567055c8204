"""The shape of a model: upstream's ``config.json`` keys as a strict dataclass, and the named shapes. Needs no
torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xverse.config import UserError, build, choose
from xverse.model.families import family_fields, family_of
from xverse.model.scaling import RopeScaling

# Parameters. On a CPU smaller models run in float32, which any CPU is fast at; larger ones may not fit.
FLOAT32_BELOW = 1_000_000_000
_MOST_MODULES = 4096  # layers, or experts of a layer

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Fields that XVERSE does not have; ``to_json`` writes them under the family's own keys, or not at all.
FAMILY_FIELDS = frozenset(
    {
        "model_type", "num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias",
        "output_bias", "qk_norm", "norm_in_float32", "num_experts", "moe_top_k", "num_shared_experts",
        "norm_topk_prob",
    }
)  # fmt: skip
EXPERT_FIELDS = ("num_experts", "moe_top_k", "num_shared_experts", "norm_topk_prob")


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
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | None = 3
    initializer_range: float = 0.02
    rope_scaling: RopeScaling | None = None
    # What XVERSE's relatives have otherwise (``model/families.py``). 0: as many as num_attention_heads, and
    # hidden_size / num_attention_heads.
    model_type: str = "xverse"
    num_key_value_heads: int = 0
    head_dim: int = 0
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # of queries, keys and values
    output_bias: bool = False  # of the attention's output
    qk_norm: bool = False  # each head's queries and keys are normed before they are rotated
    norm_in_float32: bool = True  # RMSNorm's weight is applied before the result is rounded to 16 bits
    # Of XVERSE-MoE, whose experts have ``intermediate_size`` each; see ``RoutedMLP``. 0: no experts.
    num_experts: int = 0
    moe_top_k: int = 0
    num_shared_experts: int = 0
    norm_topk_prob: bool = False

    def __post_init__(self) -> None:
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("num_hidden_layers", "num_experts"):  # a damaged number would make modules without end
            if getattr(self, name) > _MOST_MODULES:
                raise ValueError(f"{name} must be at most {_MOST_MODULES}, not {getattr(self, name)}")
        for name in ("rms_norm_eps", "rope_theta", "max_position_embeddings"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name):g}")
        heads = self.num_attention_heads
        if not self.head_dim and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not split into {heads} heads of an even size"
            )
        for name, derived in (("num_key_value_heads", heads), ("head_dim", self.hidden_size // heads)):
            object.__setattr__(self, name, getattr(self, name) or derived)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not split into {heads} heads of an even size"
            )
        if self.num_key_value_heads < 1 or heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if min(self.num_experts, self.moe_top_k, self.num_shared_experts) < 0:
            raise ValueError("num_experts, moe_top_k and num_shared_experts must not be negative")
        if self.num_experts and not 1 <= self.moe_top_k <= self.num_experts:
            raise ValueError(f"moe_top_k {self.moe_top_k} is out of range (1 to {self.num_experts} experts)")

    @property
    def attention_size(self) -> int:
        """The width of a layer's queries: all heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """The width of a layer's keys, and of its values."""
        return self.num_key_value_heads * self.head_dim

    @property
    def context_length(self) -> int:
        """The longest text in tokens: ``max_position_embeddings``, extended by rope scaling."""
        if self.rope_scaling is None:
            return self.max_position_embeddings
        return self.rope_scaling.context_length(self.max_position_embeddings)

    def given(self) -> dict[str, Any]:
        """The fields by name, without those of the family that have the values they have in XVERSE."""
        values = dataclasses.asdict(self)
        plain = {field.name: field.default for field in dataclasses.fields(self)}
        plain |= {"num_key_value_heads": self.num_attention_heads}
        plain |= {"head_dim": self.hidden_size // self.num_attention_heads}
        return {k: v for k, v in values.items() if k not in FAMILY_FIELDS or v != plain[k]}

    def num_parameters(self, *, active: bool = False) -> int:
        """Trainable parameters; those of a tied head are counted once. ``active``: without the experts that a
        token does not use."""
        d, q, kv = self.hidden_size, self.attention_size, self.kv_size
        experts = (self.moe_top_k if active else self.num_experts) + self.num_shared_experts
        layer = 2 * d * (q + kv) + 2 * d + d * self.num_experts  # the last is the router
        layer += 3 * d * self.intermediate_size * (experts if self.num_experts else 1)
        layer += self.attention_bias * (q + 2 * kv) + self.output_bias * d + self.qk_norm * 2 * self.head_dim
        ends = 1 if self.tie_word_embeddings else 2
        return ends * self.vocab_size * d + self.num_hidden_layers * layer + d

    @property
    def networks(self) -> dict[str, int]:
        """The feed-forward networks of a layer by name, with their widths: one, or all experts."""
        if not self.num_experts:
            return {"mlp": self.intermediate_size}
        sizes = {f"mlp.experts.{number}": self.intermediate_size for number in range(self.num_experts)}
        if self.num_shared_experts:
            sizes["mlp.shared_experts"] = self.num_shared_experts * self.intermediate_size
        return sizes

    def without_experts(self, what: str) -> XverseConfig:
        """The configuration itself. Raises UserError, for ``what``, if it has routed experts."""
        if self.num_experts:
            raise UserError(f"{what}: models with routed experts (num_experts) are not supported")
        return self

    def flops_per_token(self, length: int) -> dict[str, float]:
        """Training FLOPs per token, see ``training_flops``."""
        embedding = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        parameters = self.num_parameters(active=True) - embedding
        return training_flops(parameters, self.num_hidden_layers, self.attention_size, length)

    def to_json(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """``config.json`` as upstream writes it, without ``auto_map``; ``dtype`` is that of the stored
        weights."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in FAMILY_FIELDS}
        values.pop("rope_scaling")
        if self.rope_scaling is not None:
            values["rope_scaling"] = self.rope_scaling.to_json()
        family = family_of({"model_type": self.model_type}, "model_type")
        if self.model_type != "xverse":
            values.pop("max_tokenizer_truncation")
            values |= {"num_key_value_heads": self.num_key_value_heads, "head_dim": self.head_dim}
            written = family_of({"model_type": family.written or self.model_type}, "model_type")
            if written.bias_key:
                values[written.bias_key] = self.attention_bias
            values |= family.constants
        if self.num_experts:
            values |= {name: getattr(self, name) for name in EXPERT_FIELDS}
            if self.num_key_value_heads != self.num_attention_heads:
                values["num_key_value_heads"] = self.num_key_value_heads
        return {
            "architectures": ["XverseMoeForCausalLM" if self.num_experts else family.architecture],
            "model_type": family.written or self.model_type,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": dtype,
            "use_cache": True,
            **values,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str = "config.json") -> XverseConfig:
        """Read ``config.json``, ignoring unknown keys as every reader of the format does.

        Raises UserError for a missing key or an unsupported architecture.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        fields = family_fields(values, where)
        optional = ("pad_token_id", "bos_token_id", "eos_token_id")
        kept = {k: v for k, v in fields.items() if k in known and (v is not None or k in optional)}
        if kept.get("model_type", "xverse") == "xverse":  # upstream's files may leave them out or have null
            kept = {key: value for key, value in kept.items() if value is not None}
        rope = fields.get("rope_parameters") or fields.get("rope_scaling")
        kept.pop("rope_scaling", None)
        config = build(cls, kept, where)
        if not rope:
            return config
        scaling = RopeScaling.from_json(rope, config.max_position_embeddings, where)
        theta = kept.get("rope_theta", rope.get("rope_theta", cls.rope_theta))
        return dataclasses.replace(config, rope_theta=theta, rope_scaling=scaling)


def training_flops(parameters: int, layers: int, attention_size: int, length: int) -> dict[str, float]:
    """Training FLOPs per token, forward and backward: 6 for each of ``parameters`` (without the embedding's)
    and those of attention over ``length`` tokens, counted "full" (12 · layers · d · T) or "causal" (half)."""
    attention = 12 * layers * attention_size * length
    return {"full": 6 * parameters + attention, "causal": 6 * parameters + attention / 2}


def _shape(
    vocab: int, hidden: int, intermediate: int, layers: int, heads: int, context: int = 8192, **others: Any
) -> XverseConfig:
    return XverseConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
        **others,
    )


_EXPERTS: dict[str, Any] = {
    "num_experts": 64,
    "moe_top_k": 6,
    "num_shared_experts": 2,
    "rope_theta": 500000.0,
}
SHAPES: dict[str, XverseConfig] = {
    "nano": _shape(12288, 256, 768, layers=6, heads=4),
    "mini": _shape(12288, 512, 1408, layers=8, heads=8),
    "7b": _shape(100534, 4096, 11008, layers=32, heads=32),
    "13b": _shape(100278, 5120, 13824, layers=40, heads=40),
    "13b-2": _shape(100534, 5120, 13824, layers=40, heads=40),
    "65b": _shape(100534, 8192, 22016, layers=80, heads=64, context=16384),
    "moe-a4.2b": _shape(100534, 2560, 1728, layers=28, heads=32, **_EXPERTS),
    # 16 key heads are inferred from the published numbers of parameters.
    "moe-a36b": _shape(100534, 6144, 4096, layers=50, heads=48, num_key_value_heads=16, **_EXPERTS),
}


def named_shape(name: str) -> XverseConfig:
    """The configuration of a published or embedded shape; raises UserError for an unknown name."""
    return choose("shape", name, SHAPES)
