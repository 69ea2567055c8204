"""The decoder: pre-norm, rotary attention, SwiGLU. The only definition.

XVERSE has as many key and value heads as query heads, an untied head and no biases; the configuration covers
what its relatives have instead (``model/families.py``). Tensor names are upstream's (Llama's). The forward
pass has no caches, masks or devices: an attention context provides them (``model/attention.py``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from xverse.model.attention import AttentionContext
from xverse.model.config import XverseConfig
from xverse.model.loss import linear_cross_entropy
from xverse.model.mlp import MLP, RoutedMLP, apply_all, make_linear
from xverse.model.rope import rope_tables, rotate


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich, 2019), in float32.

    XVERSE rounds to the input's dtype after the weight has been applied (``in_float32``), Llama before it. In
    float32 they agree.
    """

    def __init__(self, size: int, eps: float, in_float32: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.in_float32 = in_float32

    def forward(self, x: Tensor) -> Tensor:
        """[…, D] → […, D] in ``x``'s dtype."""
        if not self.in_float32:
            normed = rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)
            return (self.weight * normed).to(x.dtype)
        normed = rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return normed.to(x.dtype)


def norm_of(config: XverseConfig, size: int) -> RMSNorm:
    """A norm of ``size`` values with the configuration's epsilon and rounding."""
    return RMSNorm(size, config.rms_norm_eps, config.norm_in_float32)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023, arXiv:2305.13245), with one query head for each key head
    multi-head attention; the context provides mask and cache."""

    def __init__(self, config: XverseConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        size, bias = config.hidden_size, config.attention_bias
        self.q_proj = make_linear(size, config.attention_size, bias)
        self.k_proj = make_linear(size, config.kv_size, bias)
        self.v_proj = make_linear(size, config.kv_size, bias)
        self.o_proj = make_linear(config.attention_size, size, config.output_bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm, self.k_norm = norm_of(config, self.head_dim), norm_of(config, self.head_dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], context: AttentionContext) -> Tensor:
        """``x`` [B, T, D] and rotary tables [B, 1, T, head_dim] → [B, T, D]."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = apply_all((self.q_proj, self.k_proj, self.v_proj), x)
        q, k = q.view(heads), k.view(heads)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotate(q, k, rope)
        mixed = context.attend(self.layer, q, k, v.view(heads).transpose(1, 2))  # [B, H, T, head_dim]
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # [B, T, D]

    def rotate(self, q: Tensor, k: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rotate queries [B, T, H, head_dim] and keys [B, T, KV, head_dim] → [B, H or KV, T, head_dim]."""
        return rotate(q.transpose(1, 2), *rope), rotate(k.transpose(1, 2), *rope)


class DecoderLayer(nn.Module):
    """Attention and feed-forward network, each behind a norm, with residual connections."""

    def __init__(self, config: XverseConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = RoutedMLP(config) if config.num_experts else MLP(config)
        self.input_layernorm = norm_of(config, config.hidden_size)
        self.post_attention_layernorm = norm_of(config, config.hidden_size)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], context: AttentionContext) -> Tensor:
        """``x`` [B, T, D] and rotary tables [B, 1, T, head_dim] → [B, T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), rope, context)
        return x + self.mlp(self.post_attention_layernorm(x))  # [B, T, D]


class XverseModel(nn.Module):
    """Tokens to hidden states."""

    def __init__(self, config: XverseConfig) -> None:
        super().__init__()
        self.config = config
        # from_pretrained skips random initialisation, whose first use on the meta device imports 90 MB in 2
        # seconds; the values come from a file or from init_weights.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False, padding_idx=config.pad_token_id
        )
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = norm_of(config, config.hidden_size)

    def forward(self, tokens: Tensor, context: AttentionContext) -> Tensor:
        """``tokens`` int64 [B, T] → normed hidden states [B, T, D]."""
        return self.forward_embeddings(self.embed_tokens(tokens), context)

    def forward_embeddings(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Embeddings [B, T, D] → normed hidden states [B, T, D]."""
        rope = self.rope(context, x.dtype)
        for layer in self.layers:
            x = layer(x, rope, context)
        return self.norm(x)

    def rope(self, context: AttentionContext, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [B, 1, T, head_dim] for the positions of ``context``, in ``dtype``."""
        cos, sin = rope_tables(context.positions, self.config, getattr(context, "rope_lengths", None))
        return cos.to(dtype), sin.to(dtype)


class XverseForCausalLM(nn.Module):
    """The language model: ``model`` and ``lm_head``, which may share the embedding's weight."""

    def __init__(self, config: XverseConfig) -> None:
        super().__init__()
        self.config = config
        self.model = XverseModel(config)
        self.lm_head = make_linear(config.hidden_size, config.vocab_size)
        self.tie()

    @classmethod
    def empty(cls, config: XverseConfig) -> XverseForCausalLM:
        """A model on the meta device, for parameters that are assigned."""
        with torch.device("meta"):
            return cls(config)

    def tie(self) -> None:
        """Make the head share the embedding's weight if the configuration ties them; again after the
        embedding's weight has been replaced."""
        if self.config.tie_word_embeddings and hasattr(self, "lm_head"):  # not in the middle of a pipeline
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, context: AttentionContext) -> Tensor:
        """``tokens`` int64 [B, T] → logits [B, T, V]. Training uses ``linear_cross_entropy`` instead."""
        return self.lm_head(self.model(tokens, context))

    def loss(self, tokens: Tensor, targets: Tensor, context: AttentionContext, z_loss: float = 0.0) -> Tensor:
        """Sum of the token losses in nats, float32 [], of int64 [B, T] each, without the full logits; targets
        of -100 are ignored."""
        hidden = self.model(tokens, context)  # [B, T, D]
        return linear_cross_entropy(
            hidden.flatten(0, 1), self.lm_head.weight, targets.flatten(), reduction="sum", z_loss=z_loss
        )


@torch.no_grad()
def init_weights(model: XverseForCausalLM, seed: int) -> None:
    """Normal weights with standard deviation ``initializer_range``. The two projections that write into the
    residual stream are scaled by 1/sqrt(2 · layers), so that its variance does not grow with depth (as in
    GPT-2)."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        init_parameter(parameter, name, model.config, generator)


@torch.no_grad()
def init_parameter(parameter: Tensor, name: str, config: XverseConfig, generator: torch.Generator) -> Tensor:
    """Fill one whole parameter as ``init_weights`` does, in place; returns it."""
    if parameter.dim() == 1:
        return parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
    std = config.initializer_range
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std = std / math.sqrt(2 * config.num_hidden_layers)
    parameter.normal_(0.0, std, generator=generator)
    if name.endswith("embed_tokens.weight") and config.pad_token_id is not None:
        parameter[config.pad_token_id].zero_()
    return parameter
