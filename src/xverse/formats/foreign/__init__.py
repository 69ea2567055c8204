"""The other models of XVERSE's comparison tables, from their published directories and without their code.

They are here to be evaluated beside XVERSE. A directory's weights and tokenizer are data; what its ``.py``
files would do with them is done by transformers' own classes and by this package.
"""

from __future__ import annotations

from xverse.formats.foreign.load import ForeignModel, load_foreign
from xverse.formats.foreign.text import ForeignTokenizer, load_foreign_tokenizer

__all__ = ["ForeignModel", "ForeignTokenizer", "load_foreign", "load_foreign_tokenizer"]
