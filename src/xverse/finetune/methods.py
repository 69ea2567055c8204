"""Which weights are trained: all, an adapter's, or those of some layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from xverse.config import UserError, nearest
from xverse.finetune.settings import Settings
from xverse.formats.adapters import check_adapter, import_peft, peft_config, peft_model
from xverse.kernels.linear import QuantLinear

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def prepare(model: Any, settings: Settings) -> Any:
    """Prepare a transformers model for ``finetuning_type``; with an adapter, returns peft's wrapper.

    Raises UserError for unknown module names.
    """
    if settings.finetuning_type == "lora":
        return _with_adapter(model, settings)
    if settings.adapter_name_or_path:
        raise UserError("adapter_name_or_path needs finetuning_type lora")
    if settings.finetuning_type == "freeze":
        _freeze(model, settings)
    return model


def _with_adapter(model: Any, settings: Settings) -> Any:
    peft = import_peft()
    quantised = any(isinstance(module, QuantLinear) for module in model.modules())
    if settings.adapter_name_or_path:
        path = check_adapter(settings.adapter_name_or_path, scores=settings.stage == "rm")
        config = peft_config(model, path)
        return peft_model(model, path, config, is_trainable=True)
    targets = _names(settings.lora_target, LINEARS, model, "lora_target")
    extra = settings.additional_target
    shared = {"lm_head", "embed_tokens"} & {
        *targets,
        *(_names(extra, (), model, "additional_target") if extra else ()),
    }
    if shared and model.config.tie_word_embeddings:
        raise UserError(
            f"{', '.join(sorted(shared))}: this model's head and embedding share one weight, which adapters "
            "cannot train; omit it, or use finetuning_type freeze or full"
        )
    config = peft.LoraConfig(
        task_type="SEQ_CLS" if settings.stage == "rm" else "CAUSAL_LM",  # SEQ_CLS trains the head, too
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        modules_to_save=_names(extra, (), model, "additional_target") if extra else None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )
    if quantised and config.use_dora:
        raise UserError("use_dora needs unquantised weights, whose norms DoRA uses; omit it")
    if quantised:
        from xverse.formats.qlora import register

        register(config)
    adapted = peft.get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = settings.model_name_or_path
    return adapted


def _names(text: str, all_names: tuple[str, ...], model: Any, flag: str) -> list[str]:
    names = list(all_names) if text == "all" else [name.strip() for name in text.split(",")]
    known = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _has_weight(module)})
    for name in names:
        if name not in known:
            raise UserError(f"{flag}: no module '{name}'{nearest(name, known)} (modules: {', '.join(known)})")
    return names


def _has_weight(module: nn.Module) -> bool:
    return isinstance(module, QuantLinear) or isinstance(getattr(module, "weight", None), nn.Parameter)


def _freeze(model: Any, settings: Settings) -> None:
    """Train only the last ``freeze_trainable_layers`` layers, or the first ones if it is negative."""
    count, layers = settings.freeze_trainable_layers, model.model.layers
    if abs(count) > len(layers):
        raise UserError(f"freeze_trainable_layers {count}: the model has {len(layers)} layers")
    model.requires_grad_(False)
    linears = tuple(name.rpartition(".")[2] for name, m in layers[0].named_modules() if _has_weight(m))
    names = _names(settings.freeze_trainable_modules, linears, model, "freeze_trainable_modules")
    for layer in layers[-count:] if count > 0 else layers[:-count]:
        for name, module in layer.named_modules():
            if name.rpartition(".")[2] in names or name in names:
                module.requires_grad_(True)
    if settings.freeze_extra_modules:
        for extra in _names(settings.freeze_extra_modules, (), model, "freeze_extra_modules"):
            for name, module in model.named_modules():
                if name.rpartition(".")[2] == extra and ".layers." not in name:
                    module.requires_grad_(True)


def trainable(model: nn.Module) -> tuple[int, int]:
    """The numbers of trained and of all parameters. Sharded ones (ZeRO-3) count whole."""
    counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)
