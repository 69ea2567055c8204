"""Read, write, convert and compare model directories (XVERSE's as published, Hugging Face's, Llama's) and
GGUF.

Names are imported on first use, so that ``resolve`` alone does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xverse.formats.compare import logits, parity
    from xverse.formats.directory import (
        ModelDirectory,
        load_tokenizer,
        read_config,
        read_generation_config,
        read_scheme,
    )
    from xverse.formats.gguf import open_gguf, save_gguf
    from xverse.formats.read import load_model
    from xverse.formats.write import save_hf, save_llama, save_quantized
    from xverse.hub.resolve import resolve

_HOME = {
    "resolve": "xverse.hub.resolve",
    "logits": "xverse.formats.compare",
    "parity": "xverse.formats.compare",
    "open_gguf": "xverse.formats.gguf",
    "save_gguf": "xverse.formats.gguf",
    "load_model": "xverse.formats.read",
    "ModelDirectory": "xverse.formats.directory",
    "load_tokenizer": "xverse.formats.directory",
    "read_config": "xverse.formats.directory",
    "read_generation_config": "xverse.formats.directory",
    "read_scheme": "xverse.formats.directory",
    "save_hf": "xverse.formats.write",
    "save_llama": "xverse.formats.write",
    "save_quantized": "xverse.formats.write",
}

__all__ = [
    "ModelDirectory",
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
    return getattr(importlib.import_module(_HOME[name]), name)
