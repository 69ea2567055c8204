"""The other models in XVERSE's comparison tables, loaded from their published directories for evaluation.

Only weights, config and tokenizer are read. The ``.py`` files of a directory are never run; transformers'
classes and this package compute the same.
"""

from __future__ import annotations

from xverse.formats.foreign.load import ForeignModel, load_foreign
from xverse.formats.foreign.text import ForeignTokenizer, load_foreign_tokenizer

__all__ = ["ForeignModel", "ForeignTokenizer", "load_foreign", "load_foreign_tokenizer"]
