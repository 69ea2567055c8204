"""Words and hashes of word n-grams, which near-duplicate detection and decontamination compare.

Chinese, Japanese, Thai, Lao, Burmese and Khmer are written without spaces: each character counts as a word,
so an n-gram is n characters.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

import numpy as np
from numpy.typing import NDArray

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
# Blanks, punctuation and symbols, but not combining marks (Hindi vowels, Arabic and Hebrew points).
_SEPARATORS = (
    "\x00-/:-@\\[-`{-\xa9\xab-\xb4\xb6-\xb9\xbb-\xbf\xd7\xf7\u02c2-\u02df\u0387\u055a-\u0589\u05be\u05c0\u05c3\u05c6"
    "\u05f3\u05f4\u0600-\u060f\u061b-\u061f\u066a-\u066d\u06d4\u0964\u0965\u0970\u1680\u2000-\u206f\u20a0-\u20cf"
    "\u2100-\u214f\u2190-\u2bff\u2e00-\u2e7f\u3000-\u3004\u3008-\u3020\u3030\u30a0\u30fb\ufe10-\ufe6f\uff00-\uff0f"
    "\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\U0001f000-\U0001faff"
)
_WORD = re.compile(f"[{UNSPACED}]|[^{_SEPARATORS}{UNSPACED}]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)


def split_words(text: str) -> list[str]:
    """The words of a text, without regard to case, width and punctuation."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class _Hashes(dict[str, int]):
    """The 64-bit hash of each word, cached."""

    def __missing__(self, word: str) -> int:
        if len(self) > 2_000_000:
            self.clear()
        value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        self[word] = value
        return value


_hashes = _Hashes()


def hash_words(text: str) -> NDArray[np.uint64]:
    """The hash of each word of a text, uint64 [words], the same on every machine."""
    words = split_words(text)
    return np.fromiter(map(_hashes.__getitem__, words), np.uint64, len(words))


def ngrams(hashes: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """The hash of each n-gram of hashed words: uint64 [words] to uint64 [max(0, words - n + 1)]."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    value = hashes[:count].copy()
    with np.errstate(over="ignore"):
        for k in range(1, n):
            value *= _BASE
            value += hashes[k : k + count]
        value ^= value >> np.uint64(31)
        value *= _MIX
        value ^= value >> np.uint64(29)
    return value
