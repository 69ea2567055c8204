"""The transformer, its shapes, attention contexts and the chunked loss. No parallelism, no IO.

``xverse.model.config`` and ``.chunks`` need no torch; names that need it are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xverse.lazy import lazy

if TYPE_CHECKING:
    from xverse.model.attention import AttentionContext, FullCausal, Packed, document_starts
    from xverse.model.config import SHAPES, XverseConfig, named_shape
    from xverse.model.loss import IGNORE, VocabularyShard, linear_cross_entropy
    from xverse.model.transformer import XverseForCausalLM, XverseModel, init_parameter, init_weights

_MODULES = {
    "xverse.model.attention": "AttentionContext FullCausal Packed document_starts",
    "xverse.model.config": "SHAPES XverseConfig named_shape",
    "xverse.model.loss": "IGNORE VocabularyShard linear_cross_entropy",
    "xverse.model.transformer": "XverseForCausalLM XverseModel init_parameter init_weights",
}
__all__ = " ".join(_MODULES.values()).split()
__getattr__ = lazy(__name__, _MODULES)
