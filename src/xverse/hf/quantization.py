"""Quantised weights behind transformers' interface: ``from_pretrained``, ``quantize``, ``save_pretrained``.

transformers calls a quantizer to prepare the empty model and to finish it after loading. This one removes the
quantised layers before, so that transformers loads the rest, and fills them from the same files afterwards,
one matrix at a time. The compressed-tensors package is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from xverse.config import UserError
from xverse.formats.compressed import EMBEDDING, Written, pack, quantization_config, refuse_order
from xverse.formats.schemes import (
    layer_of,
    quantized_layer,
    quantized_names,
    read_stored,
    scheme_of,
    set_layer,
)
from xverse.formats.weights import TensorFiles
from xverse.hf.configuration import QUANT_METHOD, StoredQuantization
from xverse.kernels.linear import QuantEmbedding, QuantLinear
from xverse.kernels.weight import QuantizedWeight
from xverse.quant.quantizer import Quantizer
from xverse.quant.settings import QuantSettings


class XverseQuantizer(HfQuantizer):
    """Loads the formats of ``xverse quantize``, compressed-tensors and GPTQ; saves the first."""

    quantization_config: StoredQuantization
    requires_calibration = True  # transformers' term: it loads quantised weights and does not quantise

    def __init__(self, quantization_config: StoredQuantization, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._pending: dict[str, Any] = {}
        self._files: list[Path] = []

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._files = [Path(file) for file in kwargs.get("checkpoint_files") or []]
        if not self._files:
            raise UserError("quantised weights can only be loaded from a directory or a hub id")
        where = self._files[0].parent
        scheme = scheme_of(self.quantization_config.stored, where / "config.json")
        names = quantized_names(TensorFiles(self._files), scheme)
        self._pending = {name: layer_of(model, name, where) for name in names}
        for name in names:
            set_layer(model, name, nn.Identity())
        ignored = [rf"^{re.escape(name)}\." for name in names]
        known = model._keys_to_ignore_on_load_unexpected or set()
        model._keys_to_ignore_on_load_unexpected = type(known)([*known, *ignored])
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
        if len(devices) > 1:
            raise UserError(
                f"a quantised model must be on one device, but device_map names {', '.join(devices)}"
            )
        norm = model.model.norm.weight
        files, where = TensorFiles(self._files), self._files[0].parent
        scheme = scheme_of(self.quantization_config.stored, where / "config.json")
        for name in list(self._pending):
            layer = self._pending.pop(name)
            shape = (layer.weight.shape[0], layer.weight.shape[1])
            stored = read_stored(files, scheme, name, shape, where)
            set_layer(model, name, quantized_layer(stored, layer, norm.dtype).to(norm.device))
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors for ``save_pretrained`` under compressed-tensors' names; updates the configuration."""
        state: dict[str, Tensor] = {}
        quantized: dict[str, nn.Module] = {}
        for name, module in model.named_modules():
            if isinstance(module, (QuantLinear, QuantEmbedding)):
                quantized[name] = module
                state |= {f"{name}.{suffix}": part for suffix, part in pack(module.to_weight()).items()}
            else:
                parameters = module.named_parameters(recurse=False)
                state |= {f"{name}.{child}": value.detach() for child, value in parameters}
        refuse_order(name for name, module in quantized.items() if getattr(module, "order", None) is not None)
        self.quantization_config.stored = describe(model)
        return state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # with adapters: gradients pass through, the quantised weights stay fixed


def register_quantizer() -> None:
    """Register the quantizer with transformers."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = StoredQuantization
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = XverseQuantizer


def describe(model: nn.Module) -> dict[str, Any]:
    """The ``quantization_config`` of a model with quantised layers."""
    kinds: dict[str, Written] = {}
    plain = []
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            groups = module.in_features // module.group_size
            kinds[name] = Written(module.bits, module.in_features, groups, bool(module.table_group))
        elif isinstance(module, QuantEmbedding):
            inputs = module.rows.shape[1] * 8 // module.bits
            kinds[name] = Written(module.bits, inputs, module.scales.shape[1], False)
        elif isinstance(module, nn.Linear):
            plain.append(name)
    return quantization_config(kinds, plain)


@torch.no_grad()
def quantize(model: Any, settings: QuantSettings, calibration: Tensor | None) -> None:
    """Replace the linears of an ``XverseForCausalLM`` in place, layer by layer, each on its device."""
    if any(isinstance(module, (QuantLinear, QuantEmbedding)) for module in model.modules()):
        raise UserError("the model is already quantised")
    if getattr(model, "is_quantized", False):
        raise UserError("the model was already quantised by another program")
    changed = [name for name, module in model.named_modules() if _is_foreign(module)]
    if changed:
        raise UserError(f"{changed[0]} is not a plain linear; quantise before adding an adapter")
    parameters = dict(model.named_parameters())
    if any(parameter.device.type == "meta" for parameter in parameters.values()):
        raise UserError("a model with offloaded weights cannot be quantised")
    names = list(parameters)
    # A tied head is read after the embedding has been replaced.
    embedding = f"{EMBEDDING}.weight"
    kept = {embedding: parameters[embedding].clone()} if model.config.tie_word_embeddings else {}
    del parameters

    def read(prefix: str) -> dict[str, Tensor]:
        chosen = [name for name in names if name.startswith(prefix)]
        return {name: kept.get(name, model.get_parameter(name)).detach().cpu() for name in chosen}

    run = Quantizer(model.config.to_model_config(), read, settings, calibration=calibration)
    for name, tensor in _placed(model, run):
        if isinstance(tensor, QuantizedWeight):
            module = name.removesuffix(".weight")
            device = model.get_parameter(name).device
            set_layer(
                model, module, QuantLinear.from_weight(tensor, model.get_submodule(module).bias).to(device)
            )
        else:
            parameter = model.get_parameter(name)
            if tensor.data_ptr() != parameter.data_ptr():
                parameter.copy_(tensor)
    model.config.quantization_config = StoredQuantization(**describe(model))
    model.hf_quantizer = XverseQuantizer(model.config.quantization_config)
    model.quantization_method = QUANT_METHOD
    model.is_quantized = True
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def _placed(model: Any, run: Quantizer) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    for name, tensor in run.tensors():
        assert name != f"{EMBEDDING}.weight" or isinstance(tensor, Tensor), "the embedding is not quantised"
        yield name, tensor


def _is_foreign(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).__module__.partition(".")[0] not in (
        "torch",
        "xverse",
    )
