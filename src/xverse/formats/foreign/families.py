"""Detect a directory's family and map its config and tensor names to classes of transformers.

Each family's published code computes the same as a class in transformers:

* ChatGLM2-6B: GLM. Both rotate adjacent pairs in the first half of a head only, so weights keep their order;
  ChatGLM2 packs queries, keys and values, and both pack gate and up.
* Falcon-7B: transformers' own class, whose keys the first published config lacks.

Models that transformers or this project's forward pass (``model/families.py``) reads are not listed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import FalconConfig, FalconForCausalLM, GlmConfig, GlmForCausalLM, PreTrainedModel

from xverse.config import UserError

_CHATGLM_NAMES = {
    "model.embed_tokens": "transformer.embedding.word_embeddings",
    "model.layers": "transformer.encoder.layers",
    "model.norm": "transformer.encoder.final_layernorm",
    "lm_head": "transformer.output_layer",
    "self_attn.o_proj": "self_attention.dense",
    "self_attn": "self_attention",
    "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}


@dataclass(frozen=True)
class Settings:
    """A directory's ``config.json``; every error names the file and the key."""

    file: Path
    values: Mapping[str, Any]

    def size(self, *keys: str, default: int | None = None) -> int:
        """The positive integer under the first of ``keys`` that is present."""
        for key in keys:
            if self.values.get(key) is not None:
                value = self.values[key]
                if type(value) is not int or value < 1:
                    raise UserError(f"{self.file}: {key} must be a positive integer, found {value!r}")
                return value
        if default is None:
            raise UserError(f"{self.file}: missing key '{keys[0]}'")
        return default

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) not in (int, float) or not 0 < value < 2**63:
            raise UserError(f"{self.file}: {key} must be a positive number, found {value!r}")
        return float(value)

    def only(self, **supported: Any) -> None:
        """Raise UserError for a value other than the supported one, which is the default."""
        for key, value in supported.items():
            stored = self.values.get(key)
            if stored is not None and stored != value:
                only = "" if value is None else f", only {value!r} is"
                raise UserError(f"{self.file}: {key} {stored!r} is not supported{only}")


@dataclass(frozen=True)
class Family:
    """``build`` makes the model, ``published`` maps a tensor name of it to the publisher's.

    Several tensors with the same published name are its consecutive rows, in the model's order.
    """

    build: Callable[[Settings], PreTrainedModel]
    published: Callable[[str], str] = str


def _chatglm(settings: Settings) -> PreTrainedModel:
    if "multi_query_group_num" not in settings.values:
        raise UserError(
            f"{settings.file}: has no multi_query_group_num; this is the first ChatGLM, and only ChatGLM2 is "
            "supported"
        )
    settings.only(
        multi_query_attention=True,
        rmsnorm=True,
        post_layer_norm=True,
        add_bias_linear=False,
        add_qkv_bias=True,
        apply_residual_connection_post_layernorm=False,
        fp32_residual_connection=False,
        tie_word_embeddings=False,
        original_rope=True,
        rope_ratio=1,
        pre_seq_len=None,
        quantization_bit=0,
    )
    heads, groups = settings.size("num_attention_heads"), settings.size("multi_query_group_num")
    if heads % groups:
        raise UserError(f"{settings.file}: multi_query_group_num {groups} does not divide {heads} heads")
    head_dim = settings.size("kv_channels", default=128)
    if head_dim % 4:
        raise UserError(f"{settings.file}: kv_channels {head_dim} cannot be rotated by half")
    return GlmForCausalLM(
        GlmConfig(
            vocab_size=settings.size("padded_vocab_size"),
            hidden_size=settings.size("hidden_size"),
            intermediate_size=settings.size("ffn_hidden_size"),
            num_hidden_layers=settings.size("num_layers"),
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=head_dim,
            max_position_embeddings=settings.size("seq_length", default=2048),
            rms_norm_eps=settings.number("layernorm_epsilon", 1e-5),
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            attention_bias=True,
            pad_token_id=None,
            eos_token_id=2,  # replaced by the tokenizer's; None means a later model's ids
        )
    )


def _falcon(settings: Settings) -> PreTrainedModel:
    settings.only(
        alibi=False,
        new_decoder_architecture=False,
        multi_query=True,
        parallel_attn=True,
        bias=False,
        apply_residual_connection_post_layernorm=False,
        tie_word_embeddings=True,
        activation="gelu",
        rope_scaling=None,
        rope_parameters=None,
    )
    heads = settings.size("num_attention_heads", "n_head")
    hidden = settings.size("hidden_size", "n_embed")
    if hidden % heads or hidden // heads % 2:
        raise UserError(f"{settings.file}: hidden_size {hidden} does not divide into {heads} even heads")
    return FalconForCausalLM(
        FalconConfig(
            vocab_size=settings.size("vocab_size"),
            hidden_size=hidden,
            num_hidden_layers=settings.size("num_hidden_layers", "n_layer"),
            num_attention_heads=heads,
            ffn_hidden_size=settings.size("ffn_hidden_size", default=4 * hidden),
            layer_norm_epsilon=settings.number("layer_norm_epsilon", 1e-5),
            max_position_embeddings=settings.size("max_position_embeddings", default=2048),
            rope_parameters={"rope_type": "default", "rope_theta": settings.number("rope_theta", 10000.0)},
            pad_token_id=None,
        )
    )


def _chatglm_name(name: str) -> str:
    name = re.sub(r"\b[qkv]_proj\b", "query_key_value", name)
    for ours, theirs in _CHATGLM_NAMES.items():
        name = re.sub(rf"\b{re.escape(ours)}\b", theirs, name)
    return name


FAMILIES = {  # by model_type
    "chatglm": Family(_chatglm, _chatglm_name),
    "RefinedWebModel": Family(_falcon),
}


def detect(settings: Settings) -> Family:
    """The family of a directory's model, from its config.json. Raises UserError for any other."""
    values, file = settings.values, settings.file
    model_type = str(values.get("model_type"))
    if model_type not in FAMILIES:
        raise UserError(
            f"{file}: model_type {model_type!r} is not supported (supported: {', '.join(FAMILIES)})"
        )
    if values.get("quantization_config"):
        raise UserError(f"{file}: quantised weights (quantization_config) are not supported")
    return FAMILIES[model_type]
