"""What other publishers' models compute, in plain PyTorch, and the shapes of their published tensors.

Written from the publishers' descriptions alone; nothing is shared with the code under test.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

VOCAB, HIDDEN, LAYERS, HEADS, INNER = 500, 64, 2, 4, 96

Tensors = dict[str, Tensor]


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


def llama_shapes(packed: bool = False, bias: bool = False, groups: int = HEADS) -> dict[str, tuple[int, ...]]:
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


def dynamic_forward(tensors: Tensors, config: dict[str, Any], ids: Tensor, start: int) -> Tensor:
    """InternLM with dynamic rotary frequencies: the base grows with a text longer than the trained length."""
    longest, dims = config["max_position_embeddings"], HIDDEN // HEADS
    length = start + ids.shape[1]
    base = config["rotary"]["base"] * max(1.0, length / longest) ** (dims / (dims - 2))
    return llama_forward(tensors, config, ids, start, base)


# ChatGLM2: a head has 24 components, so that heads and hidden size differ.

GLM_DIM, GLM_GROUPS = 24, 2


def chatglm_shapes() -> dict[str, tuple[int, ...]]:
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


def falcon_shapes() -> dict[str, tuple[int, ...]]:
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


def mpt_shapes() -> dict[str, tuple[int, ...]]:
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
