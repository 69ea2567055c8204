"""Bindings of the tokenizer's compiled code: counting words, learning merges (csrc/words.cpp, csrc/bpe.cpp).

``encoder.py`` calls the encoder (csrc/encode.cpp).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from xverse.config import UserError

LIBRARY = Path(__file__).with_name("libxverse_bpe.so")
LONGEST_WORD = 16_384  # bytes; kLongestWord of csrc/words.h

_POINTER, _INT64, _INT, _TEXT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_char_p
_PATHS = ctypes.POINTER(ctypes.c_char_p)
_REPORT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_SIGNATURES = {
    "xvt_counter": ([_TEXT, _INT64], _POINTER),
    "xvt_counter_free": ([_POINTER], None),
    "xvt_counter_add": ([_POINTER, _TEXT, _POINTER, _INT64], _INT),
    "xvt_counter_finish": ([_POINTER, _POINTER], _INT),
    "xvt_word_bounds": ([_TEXT, _INT64, _POINTER, _POINTER], _INT64),
    "xvt_merge_words": ([_PATHS, _INT, _TEXT, _POINTER], _INT),
    "xvt_count_characters": ([_TEXT, _INT64, _POINTER], _INT),
    "xvt_concatenate": ([_POINTER, _POINTER, _POINTER, _INT64, _POINTER, _INT64], _INT64),
    "xvt_train": (
        [
            *(_PATHS, _POINTER, _INT, _INT64, _POINTER, _INT64, ctypes.c_uint32, ctypes.c_uint32, _INT64),
            *(ctypes.c_uint32, _INT64, _INT, _REPORT, _POINTER, _POINTER, _POINTER),
        ],
        _INT64,
    ),
    "xvt_encoder": ([_INT, _POINTER, _POINTER, _INT64, _POINTER, _POINTER, _INT64], _POINTER),
    "xvt_encoder_free": ([_POINTER], None),
    "xvt_encode": ([_POINTER, _TEXT, _POINTER, _INT64, ctypes.c_uint32, _INT, _POINTER, _POINTER], _INT64),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None if it was not compiled."""
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, result
    return loaded


def require() -> ctypes.CDLL:
    """The library. Raises UserError if it was not compiled."""
    loaded = library()
    if loaded is None:
        raise UserError(
            "this needs xverse's compiled code, which was not built because there was no C++ compiler: "
            "install a compiler (c++, g++ or clang++), then xverse again"
        )
    return loaded


class Counter:
    """Counts words into sorted run files ``PREFIX.0``, ``PREFIX.1`` …, in about ``memory`` bytes.

    Not thread-safe; calls release the GIL. ``finish`` returns (words, words skipped because they are longer
    than 16,384 bytes, run files). Raises OSError if the disk is full.
    """

    def __init__(self, prefix: Path, memory: int) -> None:
        self._prefix = prefix
        self._counter = require().xvt_counter(os.fsencode(prefix), memory)
        if not self._counter:
            raise MemoryError

    def add(self, documents: Sequence[bytes]) -> None:
        """Count the words of texts in valid UTF-8."""
        ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
        data = documents[0] if len(documents) == 1 else b"".join(documents)
        code = require().xvt_counter_add(self._counter, data, ends.ctypes.data, len(ends))
        _check(code, self._prefix)

    def finish(self) -> tuple[int, int, int]:
        figures = np.zeros(3, dtype=np.int64)
        _check(require().xvt_counter_finish(self._counter, figures.ctypes.data), self._prefix)
        words, long_words, runs = figures.tolist()
        return words, long_words, runs

    def close(self) -> None:
        require().xvt_counter_free(self._counter)
        self._counter = None


def merge_words(sources: Sequence[Path], target: Path) -> tuple[int, int, int]:
    """Merge files of counted words into one; returns (distinct words, occurrences, bytes)."""
    figures = np.zeros(3, dtype=np.int64)
    code = require().xvt_merge_words(_paths(sources), len(sources), os.fsencode(target), figures.ctypes.data)
    _check(code, target)
    different, occurrences, size = figures.tolist()
    return different, occurrences, size


def count_characters(sources: Sequence[Path], multipliers: Sequence[int]) -> np.ndarray:
    """The weighted number of occurrences of each character in files of counted words, int64 [0x110000]."""
    counts = np.zeros(0x110000, dtype=np.int64)
    for source, multiplier in zip(sources, multipliers, strict=True):
        code = require().xvt_count_characters(os.fsencode(source), multiplier, counts.ctypes.data)
        _check(code, source)
    return counts


def train(
    sources: Sequence[Path],
    multipliers: Sequence[int],
    alphabet: Sequence[str],
    *,
    first_id: int,
    vocab_size: int,
    min_frequency: int,
    max_token_length: int,
    memory: int,
    threads: int,
    report: Callable[[int, int], None] = lambda merges, count: None,
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Learn the merges of counted words, the same as the library's BpeTrainer.

    Returns ids uint32 [N, 3] (left, right, result) in order, their counts int64 [N], and figures (words,
    phases). The ids of ``alphabet`` begin at ``first_id``; those of the merges follow. ``report(merges so
    far, last count)`` is called from time to time.
    """
    stopped: list[BaseException] = []

    def call_report(merges: int, count: int) -> int:
        try:
            report(merges, count)
        except BaseException as error:  # also KeyboardInterrupt, which ctypes would lose
            stopped.append(error)
            return 1
        return 0

    points = np.array([ord(character) for character in alphabet], dtype=np.uint32)
    scale = np.array(multipliers, dtype=np.int64)
    merges = np.empty((vocab_size, 3), dtype=np.uint32)
    counts = np.empty(vocab_size, dtype=np.int64)
    figures = np.zeros(2, dtype=np.int64)
    size = sum(source.stat().st_size for source in sources)
    made = require().xvt_train(
        *(_paths(sources), scale.ctypes.data, len(sources), size, points.ctypes.data, len(points), first_id),
        *(vocab_size, min_frequency, max_token_length, memory, threads, _REPORT(call_report)),
        *(merges.ctypes.data, counts.ctypes.data, figures.ctypes.data),
    )
    if stopped:
        raise stopped[0]
    _check(-min(made, 0), sources[0] if sources else Path())
    names = ("words", "phases")
    return merges[:made].copy(), counts[:made].copy(), dict(zip(names, figures.tolist(), strict=True))


def _paths(sources: Sequence[Path]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(sources))(*[os.fsencode(source) for source in sources])


def _check(code: int, path: Path) -> None:
    if code == 0:
        return
    if code == errno.ENOMEM:
        raise UserError("not enough memory for the words of these texts; use fewer texts")
    if code == errno.EOVERFLOW:
        raise UserError("too many distinct words for one training (4 × 10⁹ characters); use fewer texts")
    if code == errno.EBADMSG:
        raise UserError(f"{path}: not a file of counted words, or damaged; remove it and count again")
    raise OSError(code, os.strerror(code), str(path))
