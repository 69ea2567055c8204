"""Small models of other publishers in their published layouts; ``foreign_passes.py`` has their arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .foreign_passes import (
    GLM_DIM,
    GLM_GROUPS,
    HEADS,
    HIDDEN,
    INNER,
    LAYERS,
    MPT_HEADS,
    MPT_HIDDEN,
    VOCAB,
    Tensors,
    chatglm_forward,
    chatglm_shapes,
    dynamic_forward,
    falcon_forward,
    falcon_shapes,
    llama_forward,
    llama_shapes,
    mpt_forward,
    mpt_shapes,
)  # fmt: skip

POISON = "import pathlib\npathlib.Path(__file__ + '.ran').touch()\nraise RuntimeError('it was run')\n"


@dataclass(frozen=True)
class Zoo:
    """One family: its config.json, the shapes of its tensors, and its forward pass.

    ``forward(tensors, config, ids [B, T], start)`` → logits [B, T, V]; the first token stands at ``start``.
    """

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    forward: Callable[[Tensors, dict[str, Any], Tensor, int], Tensor]
    code: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()


def random_tensors(zoo: Zoo, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in zoo.shapes.items():
        if len(shape) == 1 and not name.endswith("bias"):
            tensors[name] = torch.rand(shape, generator=generator) + 0.5
        else:
            tensors[name] = torch.randn(shape, generator=generator) * (0.15 if len(shape) == 2 else 0.3)
    return tensors


def write(
    path: Path,
    zoo: Zoo,
    tensors: Tensors,
    kind: str = "bin",
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """``kind``: ``bin`` or ``safetensors``, with ``-indexed`` in two shards. No tokenizer is written."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**zoo.config, **config}))
    for name in zoo.code:
        (path / name).write_text(POISON)
    stored = {name: tensor.to(dtype).clone() for name, tensor in tensors.items()}
    stored |= {name: torch.full((4,), 7.0) for name in zoo.buffers}  # wrong on purpose: never used
    suffix, indexed = kind.removesuffix("-indexed"), kind.endswith("-indexed")
    stem = "pytorch_model" if suffix == "bin" else "model"
    save: Callable[[Tensors, Path], None] = torch.save if suffix == "bin" else save_file
    if not indexed:
        save(stored, path / f"{stem}.{suffix}")
        return path
    names = list(stored)
    home = {}
    for shard, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"{stem}-{shard:05d}-of-00002.{suffix}"
        save({name: stored[name] for name in part}, path / file)
        home |= dict.fromkeys(part, file)
    (path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    return path


_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_INV_FREQ = tuple(f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(LAYERS))
_BAICHUAN_CODE = ("configuration_baichuan.py", "modeling_baichuan.py", "tokenization_baichuan.py")


def _auto_map(name: str, kind: str) -> dict[str, str]:
    return {
        "AutoConfig": f"configuration_{name}.{kind}Config",
        "AutoModelForCausalLM": f"modeling_{name}.{kind}",
    }


_INTERNLM = Zoo(
    {
        **_LLAMA,
        "architectures": ["InternLMForCausalLM"],
        "auto_map": _auto_map("internlm", "InternLM"),
        "model_type": "internlm",
        "bias": True,
        "max_position_embeddings": 2048,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    llama_shapes(bias=True),
    llama_forward,
    ("configuration_internlm.py", "modeling_internlm.py", "tokenization_internlm.py"),
    _INV_FREQ,
)
_MPT = {
    "architectures": ["MPTForCausalLM"],
    "auto_map": _auto_map("mpt", "MPT"),
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "d_model": MPT_HIDDEN,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 2048,
    "model_type": "mpt",
    "n_heads": MPT_HEADS,
    "n_layers": LAYERS,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "verbose": 0,
    "vocab_size": VOCAB,
}
_FALCON = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_dropout": 0.0,
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "multi_query": True,
    "parallel_attn": True,
    "use_cache": True,
    "vocab_size": VOCAB,
}

ZOO = {
    "baichuan": Zoo(
        {
            **_LLAMA,
            "architectures": ["BaiChuanForCausalLM"],
            "auto_map": _auto_map("baichuan", "BaiChuan"),
            "model_type": "baichuan",
            "max_position_embeddings": 4096,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        },
        llama_shapes(packed=True),
        llama_forward,
        _BAICHUAN_CODE,
        _INV_FREQ,
    ),
    "baichuan2": Zoo(
        {
            **_LLAMA,
            "architectures": ["BaichuanForCausalLM"],
            "auto_map": _auto_map("baichuan", "Baichuan"),
            "tokenizer_class": "BaichuanTokenizer",
            "model_type": "baichuan",
            "max_position_embeddings": 4096,
            "model_max_length": 4096,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "z_loss_weight": 0,
        },
        llama_shapes(packed=True),
        llama_forward,
        (*_BAICHUAN_CODE, "generation_utils.py", "quantizer.py"),
    ),
    "chatglm2": Zoo(
        {
            "_name_or_path": "THUDM/chatglm2-6b",
            "model_type": "chatglm",
            "architectures": ["ChatGLMModel"],
            "auto_map": _auto_map("chatglm", "ChatGLM"),
            "add_bias_linear": False,
            "add_qkv_bias": True,
            "apply_query_key_layer_scaling": True,
            "apply_residual_connection_post_layernorm": False,
            "attention_dropout": 0.0,
            "attention_softmax_in_fp32": True,
            "bias_dropout_fusion": True,
            "ffn_hidden_size": INNER,
            "fp32_residual_connection": False,
            "hidden_dropout": 0.0,
            "hidden_size": HIDDEN,
            "kv_channels": GLM_DIM,
            "layernorm_epsilon": 1e-5,
            "multi_query_attention": True,
            "multi_query_group_num": GLM_GROUPS,
            "num_attention_heads": HEADS,
            "num_layers": LAYERS,
            "original_rope": True,
            "padded_vocab_size": VOCAB,
            "post_layer_norm": True,
            "rmsnorm": True,
            "seq_length": 32768,
            "use_cache": True,
            "torch_dtype": "float16",
            "tie_word_embeddings": False,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        chatglm_shapes(),
        chatglm_forward,
        ("configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py", "quantization.py"),
        ("transformer.rotary_pos_emb.inv_freq",),
    ),
    "falcon": Zoo(
        {
            **_FALCON,
            "architectures": ["FalconForCausalLM"],
            "model_type": "falcon",
            "new_decoder_architecture": False,
            "num_attention_heads": HEADS,
            "num_hidden_layers": LAYERS,
        },
        falcon_shapes(),
        falcon_forward,
        ("configuration_falcon.py", "modeling_falcon.py"),
    ),
    "falcon-old": Zoo(
        {
            **_FALCON,
            "architectures": ["RWForCausalLM"],
            "auto_map": _auto_map("RW", "RW"),
            "model_type": "RefinedWebModel",
            "n_head": HEADS,
            "n_layer": LAYERS,
        },
        falcon_shapes(),
        falcon_forward,
        ("configuration_RW.py", "modeling_RW.py"),
    ),
    "internlm": _INTERNLM,
    "internlm-dynamic": Zoo(
        {**_INTERNLM.config, "rotary": {"base": 10000, "type": "dynamic"}, "max_position_embeddings": 12},
        _INTERNLM.shapes,
        dynamic_forward,
        _INTERNLM.code,
    ),
    "llama-old": Zoo(
        {
            **_LLAMA,
            "architectures": ["LLaMAForCausalLM"],
            "bos_token_id": 0,
            "eos_token_id": 1,
            "max_sequence_length": 2048,
            "model_type": "llama",
            "pad_token_id": -1,
            "rms_norm_eps": 1e-6,
        },
        llama_shapes(),
        llama_forward,
        buffers=_INV_FREQ,
    ),
    "llama2": Zoo(
        {
            **_LLAMA,
            "_name_or_path": "meta-llama/Llama-2-7b-hf",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "num_key_value_heads": 2,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "tie_word_embeddings": False,
        },
        llama_shapes(groups=2),
        llama_forward,
    ),
    "mpt": Zoo(_MPT, mpt_shapes(), mpt_forward, ("configuration_mpt.py", "modeling_mpt.py")),
    "mpt-clipped": Zoo(
        {**_MPT, "attn_config": {**_MPT["attn_config"], "clip_qkv": 0.7}},  # type: ignore[dict-item]
        mpt_shapes(),
        mpt_forward,
    ),
    "vicuna": Zoo(
        {
            **_LLAMA,
            "_name_or_path": "vicuna-7b-v1.5",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "num_key_value_heads": HEADS,
            "pad_token_id": 0,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "tie_word_embeddings": False,
        },
        llama_shapes(),
        llama_forward,
        buffers=_INV_FREQ,
    ),
}
