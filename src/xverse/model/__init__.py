"""The transformer, its shapes, attention contexts and the chunked loss. No parallelism, no IO.

``xverse.model.config`` and ``.chunks`` need no torch; names that need it are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from xverse.model.config import SHAPES, XverseConfig, named_shape

if TYPE_CHECKING:
    from xverse.model.attention import AttentionContext, FullCausal, Packed, document_starts
    from xverse.model.loss import IGNORE, VocabularyShard, linear_cross_entropy
    from xverse.model.transformer import XverseForCausalLM, XverseModel, init_parameter, init_weights

__all__ = [
    "IGNORE",
    "SHAPES",
    "AttentionContext",
    "FullCausal",
    "Packed",
    "VocabularyShard",
    "XverseConfig",
    "XverseForCausalLM",
    "XverseModel",
    "document_starts",
    "init_parameter",
    "init_weights",
    "linear_cross_entropy",
    "named_shape",
]

_HOMES = {
    **dict.fromkeys(("AttentionContext", "FullCausal", "Packed", "document_starts"), "attention"),
    **dict.fromkeys(("IGNORE", "VocabularyShard", "linear_cross_entropy"), "loss"),
    **dict.fromkeys(("XverseForCausalLM", "XverseModel", "init_parameter", "init_weights"), "transformer"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
