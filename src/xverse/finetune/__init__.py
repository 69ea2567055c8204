"""Supervised fine-tuning on instructions."""

from xverse.finetune.sft import DatasetConfig, FinetuneRecipe, finetune

__all__ = ["DatasetConfig", "FinetuneRecipe", "finetune"]
