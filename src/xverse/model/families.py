"""The ``config.json`` of the Llama family: which values each ``model_type`` implies where it has no key for
them, and which features of it the forward pass lacks. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from xverse.config import UserError, nearest


@dataclass(frozen=True)
class Family:
    """One ``model_type``. ``architecture`` is its class in transformers.

    ``defaults`` are that class's values for keys that a file leaves out, ``implied`` fields of
    ``XverseConfig`` that have no key. ``bias_key`` is the key that adds biases to queries, keys, values and
    the attention's output. ``written`` is the ``model_type`` that is written instead, of models whose class
    transformers lacks, and ``constants`` are other keys to write.
    """

    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    implied: Mapping[str, Any] = field(default_factory=dict)
    bias_key: str = "attention_bias"
    written: str = ""
    constants: Mapping[str, Any] = field(default_factory=dict)


_CAST_FIRST = {"norm_in_float32": False}


def _ids(pad: int | None, bos: int | None, eos: int | None) -> dict[str, int | None]:
    return {"pad_token_id": pad, "bos_token_id": bos, "eos_token_id": eos}


FAMILIES: dict[str, Family] = {
    "xverse": Family("XverseForCausalLM"),
    "llama": Family("LlamaForCausalLM", {"max_position_embeddings": 2048, **_ids(None, 1, 2)}, _CAST_FIRST),
    "mistral": Family(
        "MistralForCausalLM",
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            **_ids(None, 1, 2),
        },
        _CAST_FIRST,
        constants={"sliding_window": None},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, **_ids(None, None, None)},
        {**_CAST_FIRST, "attention_bias": True},
        bias_key="",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            **_ids(None, None, None),
        },
        {**_CAST_FIRST, "qk_norm": True},
    ),
    "internlm": Family(
        "LlamaForCausalLM",
        {"bias": True, "max_position_embeddings": 2048, **_ids(0, 1, 2)},
        _CAST_FIRST,
        bias_key="bias",
        written="llama",
    ),
    "baichuan": Family("LlamaForCausalLM", _ids(0, 1, 2), _CAST_FIRST, bias_key="", written="llama"),
}

# Keys whose other values change the forward pass.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
_TYPES: dict[str, tuple[type, str]] = {
    "model_type": (str, "a text"),
    "layer_types": (list, "a list"),
    "sliding_window": (int, "a whole number"),
    "max_position_embeddings": (int, "a whole number"),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "rotary"), (Mapping, "an object")),
}
_ELSEWHERE = "xverse eval --backend transformers runs it if transformers does"
# Names of the number of experts. XVERSE-MoE's is the first; others route in other ways.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def family_of(values: Mapping[str, Any], where: str) -> Family:
    """The family of a ``config.json``. Raises UserError for a ``model_type`` that is not in ``FAMILIES``."""
    stored = values.get("model_type", "xverse")
    experts = next((key for key in _EXPERTS if values.get(key)), None)
    if experts is not None and (stored != "xverse" or experts != _EXPERTS[0]):
        raise UserError(
            f"{where}: model_type {stored!r} with {experts} = {values[experts]!r} is not supported: its "
            f"routed experts differ from XVERSE-MoE's; {_ELSEWHERE}"
        )
    if stored in FAMILIES:
        return FAMILIES[stored]
    raise UserError(
        f"{where}: model_type {stored!r} is not supported{nearest(str(stored), FAMILIES)} "
        f"(supported: {', '.join(FAMILIES)}); {_ELSEWHERE}"
    )


def family_fields(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of ``XverseConfig`` by name, with the family's defaults, from a ``config.json``; keys that the
    model does not use remain.

    Raises UserError for an unknown family and for a feature that the forward pass lacks: sliding windows,
    experts other than XVERSE-MoE's, soft caps, other activations, biases in the MLP, partly rotated heads.
    """
    for key, (kind, name) in _TYPES.items():
        if not isinstance(values.get(key), (kind, type(None))):
            raise UserError(f"{where}: {key} must be {name}, found {values[key]!r}")
    if values.get("model_type") == "xverse_moe":
        values = {**values, "model_type": "xverse"}
    family = family_of(values, where)
    fields = {**family.defaults, **values}
    if fields.get("hidden_act") == "swish":  # another name of the same
        fields["hidden_act"] = "silu"
    if fields.get("max_sequence_length") and "max_position_embeddings" not in values:  # Llama's first key
        fields["max_position_embeddings"] = fields["max_sequence_length"]
    for key, supported in _FIXED.items():
        value = fields.get(key, supported)
        if value != supported and not (value is None or value == 0):
            raise UserError(f"{where}: {key} = {value!r} is not supported, only {supported!r}")
    _check_windows(fields, where)
    if fields.get("model_type") == "baichuan" and not fields.get("max_position_embeddings"):
        raise UserError(
            f"{where}: has no max_position_embeddings, like Baichuan's 13B models, whose ALiBi attention is "
            "not supported"
        )
    if fields.get("model_type", "xverse") == "xverse":
        _check_xverse(fields, where)
        if not fields.get("num_experts"):
            fields |= {"num_experts": 0, "moe_top_k": 0, "num_shared_experts": 0}
    biases = bool(fields.get(family.bias_key))
    fields |= {"attention_bias": biases, "output_bias": biases, **family.implied}
    rotary = fields.get("rotary") or {}  # InternLM's own form of rope scaling
    if rotary:
        fields["rope_theta"] = rotary.get("base", 10000)
        kind = rotary.get("type", "origin")
        if kind not in ("origin", "dynamic"):
            raise UserError(f"{where}: rotary type {kind!r} is not supported, only 'origin' and 'dynamic'")
        if kind == "dynamic":
            fields["rope_scaling"] = {"rope_type": kind, "factor": rotary.get("scaling_factor", 1.0)}
    rope = fields.get("rope_parameters") or {}
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError(f"{where}: partial_rotary_factor {rope['partial_rotary_factor']} is not supported")
    if fields.get("model_type", "xverse") != "xverse":  # whose chat truncates prompts to fewer
        fields["max_tokenizer_truncation"] = fields.get("max_position_embeddings")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(fields.get(name), int) and fields[name] < 0:  # none, in the first conversions of Llama
            fields[name] = None
    if isinstance(fields.get("eos_token_id"), list):  # generation_config.json has them all
        fields["eos_token_id"] = next(iter(fields["eos_token_id"]), None)
    return fields


def _check_xverse(fields: Mapping[str, Any], where: str) -> None:
    """XVERSE's published code has none of its relatives' features, but XVERSE-MoE may share key heads."""
    for key in ("tie_word_embeddings", "attention_bias"):
        if fields.get(key):
            raise UserError(f"{where}: {key} = {fields[key]!r} is not supported, only False")
    heads = fields.get("num_attention_heads")
    if not fields.get("num_experts") and fields.get("num_key_value_heads", heads) not in (heads, None):
        raise UserError(f"{where}: grouped-query attention (num_key_value_heads) is not supported in XVERSE")
    check_rope_base(fields, where)


def check_rope_base(values: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a configuration of XVERSE without a key for the rope base whose base is probably
    not the default of 10,000: that of XVERSE-13B-256K is in its publisher's code alone. XVERSE-65B has
    16,384 positions and the default."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if values.get("rope_theta") or rope.get("rope_theta"):
        return
    positions = values.get("max_position_embeddings") or 0
    is_65b = (values.get("hidden_size"), positions) == (8192, 16384)
    named = "256k" in f"{where} {values.get('_name_or_path')}".lower()
    if named or (isinstance(positions, int) and positions > 8192 and not is_65b):
        what = "a 256K model" if named else f"{positions} positions"
        raise UserError(
            f"{where}: has no rope_theta, and the default of 10,000 is probably wrong for {what}; add "
            '"rope_theta", such as 500000 for XVERSE-13B-256K'
        )


def _check_windows(fields: Mapping[str, Any], where: str) -> None:
    """Sliding windows are supported only where they are turned off or not shorter than the context."""
    kinds = set(map(str, fields.get("layer_types") or ())) - {"full_attention"}
    window = fields.get("sliding_window") if fields.get("use_sliding_window", True) else None
    if fields.get("model_type") in ("qwen2", "qwen3") and not fields.get("use_sliding_window"):
        window = None
    if window is not None and window >= (fields.get("max_position_embeddings") or window):
        window = None
    if kinds or window is not None:
        detail = f"layers of type {', '.join(sorted(kinds))}" if kinds else f"sliding_window {window}"
        raise UserError(f"{where}: {detail}: only full attention is supported")
