"""The compiled pre-tokenizer of corpora, which only its tests call text by text."""

from __future__ import annotations

import numpy as np

from xverse.tokenizer import native


def pre_tokens(text: str) -> list[str]:
    """The pre-tokens of a text, with plain spaces; a literal ▁, which is always encoded as bytes, is in
    none."""
    data = text.encode()
    bounds = np.empty((2, len(data)), dtype=np.int64)
    count = native.require().xvt_word_bounds(data, len(data), bounds[0].ctypes.data, bounds[1].ctypes.data)
    return [data[begin:end].decode() for begin, end in bounds[:, :count].T.tolist()]
