"""``xverse.model``'s model behind transformers' interface."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from xverse.hf import model_chat, quantization
from xverse.hf.cached_attention import attention_context
from xverse.hf.configuration import XverseConfig
from xverse.kernels.linear import QuantLinear
from xverse.kernels.training import loss_kernels
from xverse.model.loss import IGNORE, linear_cross_entropy
from xverse.model.transformer import DecoderLayer, XverseModel
from xverse.quant.quantizer import Method, QuantSettings

_CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"  # renamed in 5.24


class XverseDecoderLayer(GradientCheckpointingLayer, DecoderLayer):
    """The model's layer, with transformers' gradient checkpointing."""


class XverseForCausalLM(PreTrainedModel, GenerationMixin):
    """XVERSE with ``from_pretrained``, ``generate``, ``save_pretrained`` and upstream's ``chat``.

    Tensor names are upstream's. Attention runs in PyTorch's scaled_dot_product_attention.
    """

    config_class = XverseConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["XverseDecoderLayer"]  # noqa: RUF012 (transformers reads plain lists)
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    # Upstream's files contain the rotary frequencies of each layer; the model computes them.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]  # noqa: RUF012

    def __init__(self, config: XverseConfig) -> None:
        super().__init__(config)
        self.model = XverseModel(config.to_model_config())
        for layer in self.model.layers:
            layer.__class__ = XverseDecoderLayer  # same parameters, same forward
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        token_type_ids: Tensor | None = None,
        skip_logits: bool | None = None,
        shift_labels: Tensor | None = None,
        cache: Cache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        **loss_kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """``input_ids`` int64 [B, T] or ``inputs_embeds`` [B, T, D] → loss, logits [B, T, V], cache.

        ``labels`` [B, T] are shifted here, ``shift_labels`` already; -100 is ignored. The loss does not
        materialise the logits. Training with labels returns none, unless ``skip_logits=False``;
        ``skip_logits=True`` omits them elsewhere. ``num_items_in_batch`` divides a summed loss. ``cache`` is
        the name of ``past_key_values`` since transformers 5.24. ``token_type_ids``, which upstream's
        tokenizer returns, and ``cache_position``, which follows from the cache, have no effect.
        ``cu_seq_lens_q`` and ``max_length_q`` are what transformers' padding-free collator adds to
        ``position_ids``; those of the keys are the same. ``num_targets`` is the number of targets with a
        loss, if known: a GPU then need not be waited for. Raises ValueError for ``output_attentions``,
        because the kernels do not keep attention weights.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions is not supported: the kernels do not keep attention weights")
        num_items = loss_kwargs.pop("num_items_in_batch", None)
        num_targets = loss_kwargs.pop("num_targets", None)
        if loss_kwargs:
            raise TypeError(f"forward() got unexpected arguments: {', '.join(loss_kwargs)}")

        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # [B, T, D]
        recomputing = self.training and any(layer.gradient_checkpointing for layer in self.model.layers)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        if recomputing:
            cache = None  # a recomputed layer would append its keys twice
        elif use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        context = attention_context(
            x.shape[0], x.shape[1], x.device, attention_mask, position_ids, cache, cu_seq_lens_q, max_length_q
        )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        with _recorded(self.model.layers if output_hidden_states else []) as states:
            hidden = self.model.forward_embeddings(x, context)  # [B, T, D]

        targets = shift_labels
        if labels is not None and targets is None:
            targets = pad(labels[:, 1:], (0, 1), value=IGNORE)  # [B, T]
        loss = None if targets is None else self._loss(hidden, targets, num_items, num_targets)
        logits = None
        if not (self.training and targets is not None if skip_logits is None else skip_logits):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])  # [B, kept, V]
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=(x, *states[:-1], hidden) if output_hidden_states else None,
            **{_CACHE: cache if use_cache else None},  # type: ignore[arg-type]  # a name of this version's
        )
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def _loss(
        self, hidden: Tensor, targets: Tensor, num_items: Tensor | int | None, num_targets: int | None
    ) -> Tensor:
        targets = targets.flatten().to(hidden.device)  # [B*T]
        flat = hidden.flatten(0, 1)  # [B*T, D]
        reduction = "mean" if num_items is None else "sum"
        weight = self._head_weight(flat)
        if weight is not None:
            loss = linear_cross_entropy(
                flat,
                weight,
                targets,
                reduction=reduction,  # type: ignore[arg-type]  # a literal
                kernels=loss_kernels(flat),
                count=num_targets,
            )
        else:
            kept = targets != IGNORE  # the head skips tokens without a loss
            if num_targets is not None:
                kept = torch.nonzero_static(kept, size=num_targets).flatten()
            loss = cross_entropy(self.lm_head(flat[kept]).float(), targets[kept], reduction=reduction)
        if num_items is not None:
            loss = loss / (num_items.to(loss.device) if isinstance(num_items, Tensor) else num_items)
        return loss

    def _head_weight(self, hidden: Tensor) -> Tensor | None:
        """The head's weight [V, D] if its forward is a plain product, else None. A quantised head is
        dequantised temporarily, which takes less memory than all logits. Adapters, FSDP, ZeRO-3 and
        accelerate's hooks act in the head's forward, which the chunked loss does not call."""
        head: Any = self.lm_head
        if head._forward_hooks or head._forward_pre_hooks or hasattr(head, "_hf_hook"):
            return None
        if type(head) is QuantLinear and head.order is None:
            kind = hidden.device.type
            autocast = torch.is_autocast_enabled(kind)
            return head.dequantize(torch.get_autocast_dtype(kind) if autocast else hidden.dtype)
        plain = type(head) is nn.Linear and head.weight.shape == (head.out_features, head.in_features)
        return head.weight if plain else None

    def chat(
        self,
        tokenizer: Any,
        messages: Sequence[Mapping[str, Any]],
        stream: bool = False,
        generation_config: GenerationConfig | None = None,
    ) -> str | Iterator[str]:
        """The assistant's next turn, as in upstream's ``chat``: a text, or with ``stream`` its deltas.

        ``tokenizer`` is this model's transformers tokenizer. ``messages`` are mappings with role and content,
        ending with a user turn; they are not modified. A conversation that exceeds the context loses its
        oldest rounds, with a warning. Closing the iterator stops the generation.
        Raises xverse.config.UserError for messages with wrong roles or order.
        """
        return model_chat.chat(self, tokenizer, messages, stream, generation_config)

    def quantize(
        self, bits: int, *, method: Method = "rtn", group_size: int = 128, calibration: Tensor | None = None
    ) -> XverseForCausalLM:
        """Weights of 8 or 4 bits in the place of this model's, layer by layer; returns the model itself.

        The linears of the layers get ``bits``, the output head 8 (none with ``rtn-row``), the
        embedding is not quantised. ``method``: ``rtn``, ``rtn-row`` (XVERSE's scheme, without groups) or
        ``gptq``, which needs ``calibration``, token ids int64 [n, T]. The model can only be used for
        inference afterwards. Raises xverse.config.UserError for other bits, methods or groups, for groups
        that do not divide a layer's inputs, and for a model that is already quantised.
        """
        settings = QuantSettings(bits=bits, method=method, group_size=group_size, embedding_bits=16)
        quantization.quantize(self, settings, calibration)
        return self

    def load_custom_generate(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, so that a directory's ``custom_generate/generate.py`` never runs."""
        raise OSError("XVERSE models use the installed generation code only")

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Nothing: transformers calls this after loading the shim, and would then copy this file."""


@contextlib.contextmanager
def _recorded(layers: Any) -> Iterator[list[Tensor]]:
    """A list that collects the outputs [B, T, D] of ``layers`` inside the ``with`` block."""
    states: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _i, output: states.append(output)) for layer in layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
