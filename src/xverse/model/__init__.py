"""The transformer, its shapes, attention contexts and the chunked loss. No parallelism, no IO."""

from xverse.model.attention import AttentionContext, FullCausal, Packed, document_starts
from xverse.model.config import SHAPES, XverseConfig, named_shape
from xverse.model.loss import IGNORE, VocabularyShard, linear_cross_entropy
from xverse.model.transformer import XverseForCausalLM, XverseModel, init_weights

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
    "init_weights",
    "linear_cross_entropy",
    "named_shape",
]
