"""XVERSE with a linear head on a text's last token, as reward models have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from xverse.hf.configuration import FamilyConfig, XverseConfig
from xverse.hf.modeling import XverseModel, XversePreTrainedModel
from xverse.model.transformer import XverseForCausalLM as ForCausalLM


class XverseForSequenceClassification(GenericForSequenceClassification, XversePreTrainedModel):
    """``AutoModelForSequenceClassification``: tensors ``model.…`` and ``score.weight`` [num_labels, D]."""

    def __init__(self, config: XverseConfig) -> None:
        XversePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = XverseModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels or 1, bias=False)
        self.post_init()

    @classmethod
    def of(
        cls, model: ForCausalLM, generation_config: Mapping[str, Any], pad_id: int
    ) -> XverseForSequenceClassification:
        """The modules of a loaded language model below a new head with one output, drawn with the standard
        deviation ``initializer_range``."""
        kind = XverseConfig if model.config.model_type == "xverse" else FamilyConfig
        config = kind.from_model_config(model.config, num_labels=1)
        config.pad_token_id = pad_id
        with torch.device("meta"):
            wrapped = cls(config)
        wrapped.model.take(model.model)
        weight = model.model.norm.weight
        wrapped.score = nn.Linear(config.hidden_size, 1, bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.normal_(wrapped.score.weight, std=config.initializer_range)
        wrapped.generation_config = GenerationConfig.from_dict(dict(generation_config))
        return wrapped

    def forward(self, *args: Any, last_tokens: Tensor | None = None, **options: Any) -> Any:
        """As transformers' classes; with ``last_tokens`` int64 [n], places in a single row of texts, the
        logits [n, num_labels] are those of these tokens."""
        if last_tokens is None:
            return super().forward(*args, **options)
        options.pop("labels", None)  # which peft passes
        hidden = self.model(*args, **options).last_hidden_state[0, last_tokens]  # [n, D]
        return SequenceClassifierOutputWithPast(logits=self.score(hidden))
