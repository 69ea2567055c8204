"""``xverse.model``'s model behind transformers' interface."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import TransformersKwargs

from xverse.hf import model_chat, quantization
from xverse.hf.attention import attention_context, prepare
from xverse.hf.configuration import FamilyConfig, XverseConfig
from xverse.kernels.bfloat16 import prepare_products
from xverse.kernels.linear import QuantLinear
from xverse.kernels.training import loss_kernels
from xverse.model.loss import IGNORE, linear_cross_entropy
from xverse.model.rope import rope_tables
from xverse.model.transformer import DecoderLayer
from xverse.model.transformer import XverseForCausalLM as ForCausalLM
from xverse.model.transformer import XverseModel as Decoder
from xverse.quant.settings import Method, QuantSettings

_CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"  # renamed in 5.24
# What transformers passes through a model to its attention functions, continuous batching included, and what
# `generate` passes although it concerns `generate` alone.
_OPTIONS = frozenset(TransformersKwargs.__annotations__) | {
    *("read_index", "write_index", "block_table", "logits_indices", "logits_processor_args"),
    *("tokenizer", "assistant_tokenizer"),
    "key_places",  # see attention_context
}


class XverseDecoderLayer(GradientCheckpointingLayer, DecoderLayer):
    """The model's layer, with transformers' gradient checkpointing."""


class XversePreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the models of this module."""

    config_class = XverseConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _no_split_modules = ["XverseDecoderLayer"]  # noqa: RUF012 (transformers reads plain lists)
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    # Upstream's files contain the rotary frequencies of each layer; the model computes them.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]  # noqa: RUF012

    def load_custom_generate(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, so that a directory's ``custom_generate/generate.py`` never runs."""
        raise OSError("XVERSE models use the installed generation code only")

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: transformers calls this after loading the shim, and would then copy this file."""


class XverseModel(XversePreTrainedModel):
    """The decoder without its head: ``AutoModel``."""

    # A directory holds the whole language model.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$", r"^lm_head\."]  # noqa: RUF012

    def __init__(self, config: XverseConfig) -> None:
        super().__init__(config)
        self.take(Decoder(config.to_model_config()))
        self.post_init()

    def take(self, decoder: Decoder) -> None:
        """Compute with the modules of ``decoder``."""
        self.shape = decoder.config
        self.embed_tokens, self.layers, self.norm = decoder.embed_tokens, decoder.layers, decoder.norm
        for index, layer in enumerate(self.layers):
            layer.__class__ = XverseDecoderLayer  # same parameters, same forward
            prepare(layer.self_attn, self.config, index)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        cache: Cache | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """``input_ids`` int64 [B, T] or ``inputs_embeds`` [B, T, D] → hidden states [B, T, D], cache.

        The arguments are those of ``XverseForCausalLM.forward``.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if unknown := sorted(options.keys() - _OPTIONS):
            raise TypeError(f"forward() got unexpected arguments: {', '.join(unknown)}")
        cache = past_key_values if cache is None else cache  # the new name wins, as in transformers
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        if output_attentions is None:
            output_attentions = config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states

        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # [B, T, D]
        prepare_products(x)
        recomputing = self.training and torch.is_grad_enabled()
        if recomputing and any(layer.gradient_checkpointing for layer in self.layers):
            cache, use_cache = None, False  # a recomputed layer would append its keys twice
        elif use_cache and cache is None:
            cache = DynamicCache(config=config)
        if output_attentions:
            options["output_attentions"] = True  # so that functions that do not return weights warn
        modules = [layer.self_attn for layer in self.layers]
        context = attention_context(modules, config, x, attention_mask, position_ids, cache, options)
        cos, sin = rope_tables(context.positions, self.shape)  # [B, 1, T, head_dim]
        rope = (cos.to(x.dtype), sin.to(x.dtype))
        states = [x]
        for layer in self.layers[: config.num_hidden_layers]:  # fewer during a draft by early exit
            states.append(layer(states[-1], rope, context))
            if not output_hidden_states:
                states = states[-1:]
        hidden = self.norm(states[-1])  # [B, T, D]
        states[-1] = hidden
        weights = getattr(context, "weights", {})
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=_selected(states, output_hidden_states),
            attentions=tuple(weights.values()) if output_attentions else None,
            **{_CACHE: cache},
        )
        if return_dict is None:
            return_dict = config.return_dict
        return output if return_dict else output.to_tuple()


class XverseForCausalLM(XversePreTrainedModel, GenerationMixin):
    """XVERSE with ``from_pretrained``, ``generate``, ``save_pretrained`` and upstream's ``chat``.

    Tensor names are upstream's.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (if they are tied)

    def __init__(self, config: XverseConfig) -> None:
        super().__init__(config)
        self.model = XverseModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def of(cls, model: ForCausalLM, generation_config: Mapping[str, Any]) -> XverseForCausalLM:
        """The modules of a loaded model, XVERSE's or a relative's, behind transformers' interface; it is
        saved as its publisher's class reads it. ``generation_config`` is that of its directory."""
        kind = XverseConfig if model.config.model_type == "xverse" else FamilyConfig
        with torch.device("meta"):
            wrapped = cls(kind.from_model_config(model.config))
        wrapped.model.take(model.model)
        wrapped.lm_head = model.lm_head
        if model.config.tie_word_embeddings:
            wrapped._keys_to_ignore_on_save = ["lm_head.weight"]
        wrapped.generation_config = GenerationConfig.from_dict(dict(generation_config))
        return wrapped

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
        output_hidden_states: bool | int | Sequence[int] | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        token_type_ids: Tensor | None = None,
        skip_logits: bool = False,
        shift_labels: Tensor | None = None,
        num_targets: int | None = None,
        cache: Cache | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """``input_ids`` int64 [B, T] or ``inputs_embeds`` [B, T, D] → loss, logits [B, T, V], cache.

        ``labels`` [B, T] are shifted here, ``shift_labels`` already; -100 is ignored.
        ``num_items_in_batch`` divides a summed loss; ``num_targets`` is the number of targets with a loss, if
        known: a GPU then need not be waited for. The loss does not need the logits: ``skip_logits`` omits
        them, which saves most of a training step's memory. ``cache`` is the name of ``past_key_values`` since
        transformers 5.24. ``token_type_ids``, which upstream's tokenizer returns, and ``cache_position``,
        which follows from the cache, have no effect. ``cu_seq_lens_q`` and ``max_length_q`` are what
        transformers' padding-free collator adds to ``position_ids``. Other options go to the attention
        function.
        """
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            return_dict=True,
            cache=cache,
            **options,
        )
        hidden = output.last_hidden_state  # [B, T, D]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = None if skip_logits else self.lm_head(hidden[:, kept])  # [B, kept, V]
        targets = shift_labels
        if labels is not None and targets is None:
            targets = pad(labels[:, 1:], (0, 1), value=IGNORE)  # [B, T]
        loss = None
        if hasattr(self, "_loss_function") and labels is not None:  # set by the user
            loss = self._loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options
            )
        elif targets is not None:
            whole = logits if isinstance(kept, slice) and not logits_to_keep else None
            loss = self._loss(hidden, whole, targets, options.get("num_items_in_batch"), num_targets)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            **{_CACHE: output.get(_CACHE)},
        )
        if return_dict is None:
            return_dict = self.config.return_dict
        return result if return_dict else result.to_tuple()

    def _loss(
        self,
        hidden: Tensor,
        logits: Tensor | None,
        targets: Tensor,
        num_items: Tensor | int | None,
        num_targets: int | None,
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
            # FSDP does not support two calls of the head in one step.
            chosen = self.lm_head(flat[kept]) if logits is None else logits.flatten(0, 1)[kept]
            loss = cross_entropy(chosen.float(), targets[kept], reduction=reduction)
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
        **options: Any,
    ) -> str | Iterator[str]:
        """The assistant's next turn, as in upstream's ``chat``: a text, or with ``stream`` its deltas.

        ``tokenizer`` is this model's transformers tokenizer. ``messages`` are mappings with role and content,
        ending with a user turn; they are not modified. A conversation that exceeds the context loses its
        oldest rounds, with a warning. Closing the iterator stops the generation. ``options`` replace settings
        (``max_new_tokens=…``) or are other arguments of ``generate`` (``logits_processor=…``).
        Raises xverse.config.UserError for messages with wrong roles or order, and for unknown options.
        """
        return model_chat.chat(self, tokenizer, messages, stream, generation_config, options)

    def quantize(
        self, bits: int, *, method: Method = "rtn", group_size: int = 128, calibration: Tensor | None = None
    ) -> XverseForCausalLM:
        """Quantise the weights to 8, 4, 3 or 2 bits in place, layer by layer; returns the model itself.

        The linears of the layers get ``bits``, the output head 8 (none with ``rtn-row``), the
        embedding is not quantised. ``method``: ``rtn``, ``rtn-row`` (XVERSE's scheme, without groups) or
        ``gptq``, which needs ``calibration``, token ids int64 [n, T]; ``rtn`` measures inputs on it, or on
        random tokens. Inputs that ``group_size`` does not divide get smaller groups. The model can only be
        used for inference afterwards. Raises xverse.config.UserError for other bits, methods or groups, and
        for a model that is already quantised.
        """
        settings = QuantSettings(bits=bits, method=method, group_size=group_size, embedding_bits=16)
        quantization.quantize(self, settings, calibration)
        return self


def _selected(states: list[Tensor], selection: bool | int | Sequence[int] | None) -> Any:
    """All ``states``, or those that a number or a list selects, with None in the place of others."""
    if selection is None or selection is False:
        return None
    if selection is True:
        return tuple(states)
    chosen = {index % len(states) for index in ([selection] if isinstance(selection, int) else selection)}
    return tuple(state if index in chosen else None for index, state in enumerate(states))
