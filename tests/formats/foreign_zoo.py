"""Small models of other publishers, in their published layouts, and what each computes, in plain PyTorch.

The references are written from the publishers' descriptions alone and share nothing with the code under test:
they read the published tensors by the published names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCAB, HIDDEN, LAYERS, HEADS, INNER = 500, 64, 2, 4, 96
POISON = "import pathlib\npathlib.Path(__file__ + '.ran').touch()\nraise RuntimeError('it was run')\n"

Tensors = dict[str, Tensor]


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
    positions: bool = True


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


# What the models are made of.


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | float, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps) * weight + bias


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def turned(x: Tensor, y: Tensor, start: int, dims: int, base: float) -> tuple[Tensor, Tensor]:
    """The pairs (x, y), each [B, H, T, dims/2], turned by position · base^(-2i/dims)."""
    places = torch.arange(start, start + x.shape[-2], dtype=torch.float64)
    speeds = base ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    angles = places[:, None] * speeds  # [T, dims/2]
    cos, sin = angles.cos().float(), angles.sin().float()
    return x * cos - y * sin, x * sin + y * cos


def rotate_halves(x: Tensor, start: int, base: float = 10000.0) -> Tensor:
    """Llama's layout: component i of a head goes with component i + d/2."""
    half = x.shape[-1] // 2
    return torch.cat(turned(x[..., :half], x[..., half:], start, x.shape[-1], base), -1)


def rotate_neighbours(x: Tensor, start: int) -> Tensor:
    """ChatGLM2's: in the first half of a head, component 2i goes with 2i + 1; the rest stays."""
    dims = x.shape[-1] // 2
    even, odd = turned(x[..., 0:dims:2], x[..., 1:dims:2], start, dims, 10000.0)
    result = x.clone()
    result[..., 0:dims:2], result[..., 1:dims:2] = even, odd
    return result


def heads(x: Tensor, count: int) -> Tensor:
    return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)  # [B, H, T, d]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Causal attention of q [B, H, T, d] to k, v [B, G, T, d] → [B, T, H·d]; H/G heads share a key."""
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias  # [B, H, T, T]
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = torch.softmax(scores.masked_fill(future, -torch.inf), -1)
    return (weights @ v).transpose(1, 2).flatten(2)


# Llama and its relatives.


def _llama_shapes(
    packed: bool = False, bias: bool = False, groups: int = HEADS
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    few = HIDDEN // HEADS * groups
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        rows = {"W_pack": 3 * HIDDEN} if packed else {"q_proj": HIDDEN, "k_proj": few, "v_proj": few}
        for name, count in {**rows, "o_proj": HIDDEN}.items():
            shapes[f"{at}self_attn.{name}.weight"] = (count, HIDDEN)
            if bias:
                shapes[f"{at}self_attn.{name}.bias"] = (count,)
        shapes[f"{at}mlp.gate_proj.weight"] = shapes[f"{at}mlp.up_proj.weight"] = (INNER, HIDDEN)
        shapes[f"{at}mlp.down_proj.weight"] = (HIDDEN, INNER)
        shapes[f"{at}input_layernorm.weight"] = shapes[f"{at}post_attention_layernorm.weight"] = (HIDDEN,)
    return {**shapes, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def llama_forward(
    tensors: Tensors, config: dict[str, Any], ids: Tensor, start: int, base: float = 10000.0
) -> Tensor:
    eps = config["rms_norm_eps"]
    groups = config.get("num_key_value_heads") or HEADS
    x = tensors["model.embed_tokens.weight"][ids]
    for i in range(LAYERS):
        at = f"model.layers.{i}."

        def linear(name: str, y: Tensor, at: str = at) -> Tensor:
            y = y @ tensors[f"{at}{name}.weight"].T
            return y + tensors.get(f"{at}{name}.bias", 0.0)

        y = rms_norm(x, tensors[f"{at}input_layernorm.weight"], eps)
        if f"{at}self_attn.W_pack.weight" in tensors:
            packed = linear("self_attn.W_pack", y)  # [B, T, 3D]
            q, k, v = packed[..., :HIDDEN], packed[..., HIDDEN : 2 * HIDDEN], packed[..., 2 * HIDDEN :]
        else:
            q, k, v = (linear(f"self_attn.{name}_proj", y) for name in "qkv")
        q, k = rotate_halves(heads(q, HEADS), start, base), rotate_halves(heads(k, groups), start, base)
        x = x + linear("self_attn.o_proj", attend(q, k, heads(v, groups)))
        y = rms_norm(x, tensors[f"{at}post_attention_layernorm.weight"], eps)
        x = x + linear("mlp.down_proj", silu(linear("mlp.gate_proj", y)) * linear("mlp.up_proj", y))
    x = rms_norm(x, tensors["model.norm.weight"], eps)
    head = tensors["lm_head.weight"]
    if config["architectures"] == ["BaichuanForCausalLM"]:
        head = head / torch.sqrt((head * head).sum(1, keepdim=True))
    return x @ head.T


def _dynamic_forward(tensors: Tensors, config: dict[str, Any], ids: Tensor, start: int) -> Tensor:
    """InternLM with dynamic rotary frequencies: the base grows with a text longer than the trained length."""
    longest, dims = config["max_position_embeddings"], HIDDEN // HEADS
    length = start + ids.shape[1]
    base = config["rotary"]["base"] * max(1.0, length / longest) ** (dims / (dims - 2))
    return llama_forward(tensors, config, ids, start, base)


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
    _llama_shapes(bias=True),
    llama_forward,
    ("configuration_internlm.py", "modeling_internlm.py", "tokenization_internlm.py"),
    _INV_FREQ,
)

# ChatGLM2: a head has 24 components, so that heads and hidden size differ.

GLM_DIM, GLM_GROUPS = 24, 2


def _chatglm_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"transformer.embedding.word_embeddings.weight": (VOCAB, HIDDEN)}
    rows = GLM_DIM * (HEADS + 2 * GLM_GROUPS)
    for i in range(LAYERS):
        at = f"transformer.encoder.layers.{i}."
        shapes |= {
            f"{at}input_layernorm.weight": (HIDDEN,),
            f"{at}self_attention.query_key_value.weight": (rows, HIDDEN),
            f"{at}self_attention.query_key_value.bias": (rows,),
            f"{at}self_attention.dense.weight": (HIDDEN, HEADS * GLM_DIM),
            f"{at}post_attention_layernorm.weight": (HIDDEN,),
            f"{at}mlp.dense_h_to_4h.weight": (2 * INNER, HIDDEN),
            f"{at}mlp.dense_4h_to_h.weight": (HIDDEN, INNER),
        }
    shapes["transformer.encoder.final_layernorm.weight"] = (HIDDEN,)
    shapes["transformer.output_layer.weight"] = (VOCAB, HIDDEN)
    return shapes


def chatglm_forward(tensors: Tensors, config: dict[str, Any], ids: Tensor, start: int) -> Tensor:
    eps = config["layernorm_epsilon"]
    x = tensors["transformer.embedding.word_embeddings.weight"][ids]
    wide, narrow = HEADS * GLM_DIM, GLM_GROUPS * GLM_DIM
    for i in range(LAYERS):
        layer = {
            name.removeprefix(f"transformer.encoder.layers.{i}."): tensor for name, tensor in tensors.items()
        }
        y = rms_norm(x, layer["input_layernorm.weight"], eps)
        packed = y @ layer["self_attention.query_key_value.weight"].T
        packed = packed + layer["self_attention.query_key_value.bias"]
        q = rotate_neighbours(heads(packed[..., :wide], HEADS), start)
        k = rotate_neighbours(heads(packed[..., wide : wide + narrow], GLM_GROUPS), start)
        v = heads(packed[..., wide + narrow :], GLM_GROUPS)
        x = x + attend(q, k, v) @ layer["self_attention.dense.weight"].T
        y = rms_norm(x, layer["post_attention_layernorm.weight"], eps)
        both = y @ layer["mlp.dense_h_to_4h.weight"].T
        x = x + (silu(both[..., :INNER]) * both[..., INNER:]) @ layer["mlp.dense_4h_to_h.weight"].T
    x = rms_norm(x, tensors["transformer.encoder.final_layernorm.weight"], eps)
    return x @ tensors["transformer.output_layer.weight"].T


# Falcon: one key and one value for all heads; attention and MLP read the same norm; the head is tied.


def _falcon_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"transformer.word_embeddings.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        at = f"transformer.h.{i}."
        shapes |= {
            f"{at}input_layernorm.weight": (HIDDEN,),
            f"{at}input_layernorm.bias": (HIDDEN,),
            f"{at}self_attention.query_key_value.weight": (HIDDEN + 2 * HIDDEN // HEADS, HIDDEN),
            f"{at}self_attention.dense.weight": (HIDDEN, HIDDEN),
            f"{at}mlp.dense_h_to_4h.weight": (4 * HIDDEN, HIDDEN),
            f"{at}mlp.dense_4h_to_h.weight": (HIDDEN, 4 * HIDDEN),
        }
    return {**shapes, "transformer.ln_f.weight": (HIDDEN,), "transformer.ln_f.bias": (HIDDEN,)}


def falcon_forward(tensors: Tensors, config: dict[str, Any], ids: Tensor, start: int) -> Tensor:
    eps, dim = config["layer_norm_epsilon"], HIDDEN // HEADS
    embedding = tensors["transformer.word_embeddings.weight"]
    x = embedding[ids]
    for i in range(LAYERS):
        layer = {name.removeprefix(f"transformer.h.{i}."): tensor for name, tensor in tensors.items()}
        y = layer_norm(x, layer["input_layernorm.weight"], layer["input_layernorm.bias"], eps)
        packed = y @ layer["self_attention.query_key_value.weight"].T
        q = rotate_halves(heads(packed[..., :HIDDEN], HEADS), start)
        k = rotate_halves(heads(packed[..., HIDDEN : HIDDEN + dim], 1), start)
        v = heads(packed[..., HIDDEN + dim :], 1)
        attended = attend(q, k, v) @ layer["self_attention.dense.weight"].T
        inner = gelu(y @ layer["mlp.dense_h_to_4h.weight"].T) @ layer["mlp.dense_4h_to_h.weight"].T
        x = x + attended + inner
    x = layer_norm(x, tensors["transformer.ln_f.weight"], tensors["transformer.ln_f.bias"], eps)
    return x @ embedding.T


# MPT: no rotation but a slope for each head; three heads, which is no power of two. Norms have no bias.

MPT_HEADS, MPT_HIDDEN = 3, 48


def _mpt_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (VOCAB, MPT_HIDDEN)}
    for i in range(LAYERS):
        at = f"transformer.blocks.{i}."
        shapes |= {
            f"{at}norm_1.weight": (MPT_HIDDEN,),
            f"{at}attn.Wqkv.weight": (3 * MPT_HIDDEN, MPT_HIDDEN),
            f"{at}attn.out_proj.weight": (MPT_HIDDEN, MPT_HIDDEN),
            f"{at}norm_2.weight": (MPT_HIDDEN,),
            f"{at}ffn.up_proj.weight": (4 * MPT_HIDDEN, MPT_HIDDEN),
            f"{at}ffn.down_proj.weight": (MPT_HIDDEN, 4 * MPT_HIDDEN),
        }
    return {**shapes, "transformer.norm_f.weight": (MPT_HIDDEN,)}


def mpt_forward(tensors: Tensors, config: dict[str, Any], ids: Tensor, start: int) -> Tensor:
    embedding = tensors["transformer.wte.weight"]
    clip = config["attn_config"]["clip_qkv"]
    # Of the four slopes 2^-2, 2^-4, 2^-6, 2^-8 for four heads: those at odd places first, then the others.
    slopes = torch.tensor([2.0**-4, 2.0**-8, 2.0**-2]).view(3, 1, 1)
    places = torch.arange(ids.shape[1], dtype=torch.float32)
    bias = slopes * (places[None, :] - places[:, None])  # [H, T, T]; only the past counts
    x = embedding[ids]
    for i in range(LAYERS):
        layer = {name.removeprefix(f"transformer.blocks.{i}."): tensor for name, tensor in tensors.items()}
        y = layer_norm(x, layer["norm_1.weight"], 0.0, 1e-5)
        packed = y @ layer["attn.Wqkv.weight"].T
        if clip:
            packed = packed.clamp(-clip, clip)
        q, k, v = (heads(part, MPT_HEADS) for part in packed.split(MPT_HIDDEN, -1))
        x = x + attend(q, k, v, bias) @ layer["attn.out_proj.weight"].T
        y = layer_norm(x, layer["norm_2.weight"], 0.0, 1e-5)
        x = x + gelu(y @ layer["ffn.up_proj.weight"].T) @ layer["ffn.down_proj.weight"].T
    return layer_norm(x, tensors["transformer.norm_f.weight"], 0.0, 1e-5) @ embedding.T


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
        _llama_shapes(packed=True),
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
        _llama_shapes(packed=True),
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
        _chatglm_shapes(),
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
        _falcon_shapes(),
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
        _falcon_shapes(),
        falcon_forward,
        ("configuration_RW.py", "modeling_RW.py"),
    ),
    "internlm": _INTERNLM,
    "internlm-dynamic": Zoo(
        {**_INTERNLM.config, "rotary": {"base": 10000, "type": "dynamic"}, "max_position_embeddings": 12},
        _INTERNLM.shapes,
        _dynamic_forward,
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
        _llama_shapes(),
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
        _llama_shapes(groups=2),
        llama_forward,
    ),
    "mpt": Zoo(
        _MPT, _mpt_shapes(), mpt_forward, ("configuration_mpt.py", "modeling_mpt.py"), positions=False
    ),
    "mpt-clipped": Zoo(
        {**_MPT, "attn_config": {**_MPT["attn_config"], "clip_qkv": 0.7}},  # type: ignore[dict-item]
        _mpt_shapes(),
        mpt_forward,
        positions=False,
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
        _llama_shapes(),
        llama_forward,
        buffers=_INV_FREQ,
    ),
}
FAMILY = {  # what each entry is recognised as, where that is not its own name
    "falcon-old": "falcon",
    "internlm-dynamic": "internlm",
    "llama-old": "llama",
    "llama2": "llama",
    "mpt-clipped": "mpt",
}
