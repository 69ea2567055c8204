"""Read, write, convert and compare model directories (XVERSE's as published, Hugging Face's, Llama's) and
GGUF.

Names are imported on first use, so that ``resolve`` alone does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xverse.lazy import lazy

if TYPE_CHECKING:
    from xverse.formats.compare import logits, parity
    from xverse.formats.directory import ModelDirectory, load_tokenizer
    from xverse.formats.gguf import save_gguf
    from xverse.formats.gguf_read import open_gguf
    from xverse.formats.read import load_model
    from xverse.formats.write import save_hf, save_llama, save_quantized
    from xverse.hub.resolve import resolve

_MODULES = {
    "xverse.formats.compare": "logits parity",
    "xverse.formats.directory": "ModelDirectory load_tokenizer",
    "xverse.formats.gguf": "save_gguf",
    "xverse.formats.gguf_read": "open_gguf",
    "xverse.formats.read": "load_model",
    "xverse.formats.write": "save_hf save_llama save_quantized",
    "xverse.hub.resolve": "resolve",
}
__all__ = " ".join(_MODULES.values()).split()
__getattr__ = lazy(__name__, _MODULES)
