"""Encoding by compiled code (csrc/encode.cpp), with the same ids as the ``tokenizers`` library but faster.

The library spends most of its time on splitting; here a text is split in one pass, and the ids of recent
words are cached. Tokenizers of another structure than XVERSE's are left to the library.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xverse.hardware import cores
from xverse.tokenizer import native

SPACE = "▁"  # U+2581, how Metaspace writes a space inside tokens
# Unlike in training (TRAINING_WORDS in train.py), all spaces before a word are part of its piece. Merges of
# spaces alone come last, so the word takes its space before the run is merged. The result is the same,
# without a rule that only this pre-tokenizer can express (formats/spm.py).
WORDS = r" *[^ \t\r\n]+|[\r\n]+|\t+| +"
_JOINED, _SPACES = 1, 2  # XvtSplit of csrc/xverse_tokenizer.h
_NONE = 2**32 - 1
_PIECES = ({"type": "Digits", "individual_digits": True}, {"type": "Punctuation", "behavior": "Isolated"})
_SPLIT = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}


class Encoder:
    """Encodes with the vocabulary of a repaired tokenizer.json. Thread-safe."""

    def __init__(self, split: int, values: dict[str, Any]) -> None:
        vocab: dict[str, int] = values["model"]["vocab"]
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in values["model"]["merges"]]
        single = {ord(token): index for token, index in vocab.items() if len(token) == 1}
        single[ord(" ")] = single[ord(SPACE)]
        points, ids = (np.array(list(column), np.uint32) for column in (single.keys(), single.values()))
        in_bytes = np.array([vocab[f"<0x{byte:02X}>"] for byte in range(256)], np.uint32)
        rows = np.array([(vocab[a], vocab[b], vocab[a + b]) for a, b in merges], np.uint32).reshape(-1, 3)
        library = native.require()
        self._encode = library.xvt_encode
        self._encoder = library.xvt_encoder(
            *(split, points.ctypes.data, ids.ctypes.data, len(ids), in_bytes.ctypes.data),
            *(rows.ctypes.data, len(rows)),
        )
        if not self._encoder:
            raise MemoryError
        weakref.finalize(self, library.xvt_encoder_free, self._encoder)

    def encode(
        self, texts: Sequence[bytes], last: int | None
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """The concatenated ids of texts in valid UTF-8, uint32 [ids], and the number of each text's ids,
        int64 [texts]; ``last`` is appended to each text."""
        ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        data = texts[0] if len(texts) == 1 else b"".join(texts)
        ids = np.empty(len(data) + len(texts), np.uint32)
        lengths = np.empty(len(texts), np.int64)
        count = self._encode(
            *(self._encoder, data, ends.ctypes.data, len(texts), _NONE if last is None else last),
            *(_threads(), ids.ctypes.data, lengths.ctypes.data),
        )
        if count < 0:
            raise MemoryError
        return ids[:count].copy(), lengths


def make_encoder(values: dict[str, Any]) -> Encoder | None:
    """The encoder for a tokenizer.json; None if the code was not compiled or the structure is another."""
    split = _split_of(values.get("pre_tokenizer"))
    model = values["model"]
    vocab = model["vocab"]
    plain = (
        not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and not model.get("ignore_merges")
        and bool(model.get("byte_fallback"))
        and values.get("normalizer") is None
        and all(token.get("special") for token in values.get("added_tokens") or [])
    )
    complete = SPACE in vocab and all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    if split is None or not plain or not complete or native.library() is None:
        return None
    return Encoder(split, values)


def _split_of(pre_tokenizer: Any) -> int | None:
    if not isinstance(pre_tokenizer, dict) or pre_tokenizer.get("type") != "Sequence":
        return None
    parts = list(pre_tokenizer.get("pretokenizers") or [])
    joined = bool(parts) and parts[0] == _SPLIT
    parts = parts[joined:]
    spaces = [part for part in parts if part.get("type") == "Metaspace"]
    others = [part for part in parts if part.get("type") != "Metaspace"]
    if len(spaces) != 1 or len(others) != 2 or any(piece not in others for piece in _PIECES):
        return None
    (space,) = spaces
    if space.get("replacement") != SPACE or space.get("prepend_scheme") != "never":
        return None
    if joined:
        return _JOINED if space.get("split") is False else None
    return _SPACES if space.get("split", True) else None


def _threads() -> int:
    """As in the library: one thread where processes provide the parallelism."""
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("false", "0", "off"):
        return 1
    return cores().usable
