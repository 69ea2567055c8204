"""Optimizers that transformers' ``optim`` does not name: Muon, and AdamW with the learning rates of LoRA+."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from xverse.finetune.settings import Settings
from xverse.train.optimizer import make_muon


def optimizer_maker(
    settings: Settings, args: TrainingArguments
) -> Callable[[Any], torch.optim.Optimizer] | None:
    """A function that makes the optimizer for a model, or None where ``optim`` names it."""
    if settings.use_muon:
        return lambda model: _muon(model, args)
    if settings.loraplus_lr_ratio is not None:
        return lambda model: _loraplus(model, args, settings)
    return None


def _muon(model: Any, args: TrainingArguments) -> torch.optim.Optimizer:
    """Muon for the layers' matrices and AdamW for the rest, with one learning rate (see ``MuonAdamW``)."""
    optimizer = make_muon(
        model,
        args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        compute_dtype=torch.bfloat16 if args.bf16 else torch.float32,
    )
    for group in optimizer.param_groups:
        group["lr"] = args.learning_rate
    return optimizer


def _loraplus(model: Any, args: TrainingArguments, settings: Settings) -> torch.optim.Optimizer:
    """LoRA+ (Hayou, Ghosh and Yu, 2024, arXiv:2402.12354): B learns faster than A."""
    from peft.optimizers import create_loraplus_optimizer

    assert settings.loraplus_lr_ratio is not None
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    return create_loraplus_optimizer(
        model,
        kind,
        loraplus_lr_ratio=settings.loraplus_lr_ratio,
        loraplus_lr_embedding=settings.loraplus_lr_embedding,
        loraplus_weight_decay=args.weight_decay,
        **options,
    )
