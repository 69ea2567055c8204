"""Quantisation-aware training: the layers' weights are rounded to the format of ``xverse quantize`` in every
forward pass, and gradients pass the rounding unchanged (the straight-through estimator; Bengio et al., 2013,
arXiv:1308.3432). What is written is what was computed with, bit for bit.

With an adapter, the sum of weight and adapter is rounded. Head, embedding and norms are not quantised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import TrainerCallback

from xverse.finetune.methods import LINEARS
from xverse.finetune.rollouts import merged_weight, whole
from xverse.formats.write import save_quantized
from xverse.kernels.weight import QuantizedWeight
from xverse.model.transformer import XverseForCausalLM
from xverse.quant.methods import rtn
from xverse.quant.settings import fitting_group
from xverse.tokenizer import Tokenizer

LARGEST_GROUP = 128


class _StraightThrough(torch.autograd.Function):
    """The weight [N, K] → ``rounded``; the gradient goes to the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class Rounded(nn.Module):
    """What both kinds of layer share. Weights are rounded once a step; outside of training, at each use."""

    weight_bits: int
    kept: QuantizedWeight | None

    def exact(self) -> Tensor:
        """The weight [N, K] that is rounded."""
        raise NotImplementedError

    @torch.no_grad()
    def rounded(self) -> QuantizedWeight:
        weight = whole(self.exact()).float()
        return rtn(weight, self.weight_bits, fitting_group(weight.shape[1], LARGEST_GROUP))

    def straight_through(self) -> Tensor:
        if self.kept is None or not self.training:
            self.kept = self.rounded()
        weight = self.exact()
        return _StraightThrough.apply(weight, self.kept.dequantize(torch.float32).to(weight.dtype))


class RoundedLinear(Rounded, nn.Linear):
    """``nn.Linear`` with its weight rounded."""

    def exact(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.straight_through(), self.bias)


class RoundedLoraLinear(Rounded, LoraLinear):
    """peft's layer with the sum of weight and adapter rounded; without the adapter as peft's."""

    def exact(self) -> Tensor:
        return merged_weight(self)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        layer: Any = self.base_layer
        weight = self.straight_through()
        return linear(x.to(weight.dtype), weight, layer.bias).to(x.dtype)


def round_in_training(model: Any, kind: str) -> None:
    """Change the classes of the linears in the layers of ``model`` so that their weights are rounded to
    ``kind``, int4 or int8. Raises UserError for inputs that no group size divides."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in LINEARS:
            continue
        if isinstance(module, LoraLinear):
            module.__class__ = RoundedLoraLinear
        elif isinstance(module, nn.Linear):
            module.__class__ = RoundedLinear
        else:
            continue
        fitting_group(module.in_features, LARGEST_GROUP)
        module.weight_bits, module.kept = int(kind.removeprefix("int")), None


class RoundAnew(TrainerCallback):
    """Has the weights rounded again after each change."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for module in kwargs["model"].modules():
            if isinstance(module, Rounded):
                module.kept = None


def write_rounded(
    trained: Any, out: Path, tokenizer: Tokenizer, dtype: torch.dtype, generation: Any, write: bool
) -> None:
    """Write the rounded model to ``out``, other tensors as ``dtype``. Every process calls it, because sharded
    weights are gathered; one with ``write`` writes."""
    base = trained.get_base_model() if hasattr(trained, "peft_config") else trained
    config = dataclasses.replace(base.config.to_model_config(), tie_word_embeddings=False)

    def tensors() -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        for name in XverseForCausalLM.empty(config).state_dict():
            path, _, kind = name.rpartition(".")
            module = base.get_submodule(path)
            if isinstance(module, Rounded) and kind == "weight":
                yield name, module.rounded().cpu()
                continue
            layer = getattr(module, "base_layer", module)
            yield name, whole(getattr(layer, kind)).to("cpu", dtype)

    if not write:
        for _ in tensors():
            pass
        return
    save_quantized(tensors(), config, tokenizer, out, generation_config=generation, overwrite=True)
