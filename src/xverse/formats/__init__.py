"""Model directories: read upstream's, Hugging Face's and Llama-named ones, write them and GGUF, compare them.

Names load on first use, so that ``resolve`` alone costs no import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xverse.formats.compare import logits, parity
    from xverse.formats.gguf import open_gguf, save_gguf
    from xverse.formats.hub import resolve
    from xverse.formats.read import (
        load_model,
        load_tokenizer,
        read_config,
        read_generation_config,
        read_scheme,
    )
    from xverse.formats.write import save_hf, save_llama, save_quantized

_HOME = {
    "resolve": "hub",
    "logits": "compare",
    "parity": "compare",
    "open_gguf": "gguf",
    "save_gguf": "gguf",
    "load_model": "read",
    "load_tokenizer": "read",
    "read_config": "read",
    "read_generation_config": "read",
    "read_scheme": "read",
    "save_hf": "write",
    "save_llama": "write",
    "save_quantized": "write",
}

__all__ = [
    "load_model",
    "load_tokenizer",
    "logits",
    "open_gguf",
    "parity",
    "read_config",
    "read_generation_config",
    "read_scheme",
    "resolve",
    "save_gguf",
    "save_hf",
    "save_llama",
    "save_quantized",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'xverse.formats' has no attribute '{name}'")
    return getattr(importlib.import_module(f"xverse.formats.{_HOME[name]}"), name)
