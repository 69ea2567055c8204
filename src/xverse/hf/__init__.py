"""Integration with transformers: Auto classes, ``.chat``, registration. Names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from xverse.hf.register import install

if TYPE_CHECKING:
    from xverse.hf.configuration import XverseConfig
    from xverse.hf.modeling import XverseForCausalLM
    from xverse.hf.tokenization import XverseTokenizer

_HOME = {"XverseConfig": "configuration", "XverseForCausalLM": "modeling", "XverseTokenizer": "tokenization"}

__all__ = ["XverseConfig", "XverseForCausalLM", "XverseTokenizer"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'xverse.hf' has no attribute '{name}'")
    install()  # again, because `import xverse` does nothing during an import of transformers
    return getattr(importlib.import_module(f"xverse.hf.{_HOME[name]}"), name)
