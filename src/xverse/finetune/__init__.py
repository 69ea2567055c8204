"""Fine-tuning on instructions. Names load on first use: the flags alone cost no import of torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xverse.finetune.examples import DatasetConfig
    from xverse.finetune.sft import FinetuneRecipe, finetune

_HOME = {"DatasetConfig": "examples", "FinetuneRecipe": "sft", "finetune": "sft"}

__all__ = ["DatasetConfig", "FinetuneRecipe", "finetune"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'xverse.finetune' has no attribute '{name}'")
    return getattr(importlib.import_module(f"xverse.finetune.{_HOME[name]}"), name)
