"""LoRA on a quantised weight (QLoRA; Dettmers et al., 2023, arXiv:2305.14314), as a peft layer."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from xverse.kernels.linear import QuantLinear


class AdaptedQuantLinear(nn.Module, LoraLayer):
    """``x`` [..., K] → [..., N] through the quantised weight, plus the active adapters. It cannot be merged;
    ``xverse export`` merges into plain weights and quantises the result."""

    def __init__(
        self, base_layer: QuantLinear, adapter_name: str, config: LoraConfig, **options: Any
    ) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about a layer type that peft does not know
            LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, options["r"], lora_alpha=options["lora_alpha"], config=config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x)
        if self.disable_adapters:
            return result
        # Under autocast a cast to the adapter's dtype would be undone at once, for each layer.
        cast = torch.is_autocast_enabled(x.device.type)
        for name in self.active_adapters:
            if name in self.lora_A:
                down: Any = self.lora_A[name]
                inputs = x if cast else x.to(down.weight.dtype)
                delta = self.lora_B[name](down(self.lora_dropout[name](inputs)))
                result = result + (delta * self.scaling[name]).to(result.dtype)
        return result


def register(config: LoraConfig) -> None:
    """Make ``config`` accept quantised layers as targets."""
    config._register_custom_module({QuantLinear: AdaptedQuantLinear})
