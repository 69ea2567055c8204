"""The compiled part of the tokenizer: words of texts, files of counts, merges (csrc/words.cpp, csrc/bpe.cpp);
``encoder.py`` calls the rest (csrc/encode.cpp)."""

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
    "xvt_encode": (
        [_POINTER, _TEXT, _POINTER, _INT64, ctypes.c_uint32, _INT, _POINTER, _POINTER],
        _INT64,
    ),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None where it was not compiled."""
    try:
        found = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, result
    return found


def require() -> ctypes.CDLL:
    """The library. Raises UserError where it was not compiled."""
    found = library()
    if found is None:
        raise UserError(
            "this needs xverse's compiled code, which was not built (no C++ compiler then): install a "
            "compiler (c++, g++ or clang++) and xverse again"
        )
    return found


def words(text: str) -> list[str]:
    """The pre-tokens of a text, spaces as they are; a literal ▁, always written as bytes, is in none."""
    data = text.encode()
    bounds = np.empty((2, len(data)), dtype=np.int64)
    count = require().xvt_word_bounds(data, len(data), bounds[0].ctypes.data, bounds[1].ctypes.data)
    return [data[begin:end].decode() for begin, end in bounds[:, :count].T.tolist()]


class Counter:
    """Counts words into sorted run files ``PREFIX.0``, ``PREFIX.1`` …, in about ``memory`` bytes.

    One thread at a time; calls release the interpreter. ``finish`` returns (words, words left out because
    they are longer than 16,384 bytes, run files). Raises UserError where the disk is full.
    """

    def __init__(self, prefix: Path, memory: int) -> None:
        self._prefix = prefix
        self._counter = require().xvt_counter(os.fsencode(prefix), memory)
        if not self._counter:
            raise MemoryError

    def add(self, documents: Sequence[bytes]) -> None:
        """Texts in valid UTF-8."""
        ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
        data = documents[0] if len(documents) == 1 else b"".join(documents)
        code = require().xvt_counter_add(self._counter, data, ends.ctypes.data, len(ends))
        _check(code, self._prefix)

    def finish(self) -> tuple[int, int, int]:
        told = np.zeros(3, dtype=np.int64)
        _check(require().xvt_counter_finish(self._counter, told.ctypes.data), self._prefix)
        words, long_words, runs = told.tolist()
        return words, long_words, runs

    def close(self) -> None:
        require().xvt_counter_free(self._counter)
        self._counter = None


def merge_words(sources: Sequence[Path], target: Path) -> tuple[int, int, int]:
    """Files of counted words into one: (different words, occurrences, bytes)."""
    told = np.zeros(3, dtype=np.int64)
    code = require().xvt_merge_words(_paths(sources), len(sources), os.fsencode(target), told.ctypes.data)
    _check(code, target)
    different, occurrences, size = told.tolist()
    return different, occurrences, size


def count_characters(sources: Sequence[Path], multipliers: Sequence[int]) -> np.ndarray:
    """How often each character stands in the words of the files, weighted: int64 [0x110000]."""
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
    """Merges of counted words: ids [N, 3] (left, right, result) in order, their counts [N], and figures.

    The ids of ``alphabet`` begin at ``first_id``; the merges' follow. ``report(merges so far, last count)``
    is called now and then. The merges are those of the library's BpeTrainer. Figures: words and phases.
    """
    stopped: list[BaseException] = []

    def told(merges: int, count: int) -> int:
        try:
            report(merges, count)
        except BaseException as error:  # KeyboardInterrupt too; it must not be lost in ctypes
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
        *(vocab_size, min_frequency, max_token_length, memory, threads, _REPORT(told)),
        *(merges.ctypes.data, counts.ctypes.data, figures.ctypes.data),
    )
    if stopped:
        raise stopped[0]
    _check(-min(made, 0), sources[0] if sources else Path())
    names = ("words", "phases")
    return merges[:made].copy(), counts[:made].copy(), dict(zip(names, figures.tolist(), strict=True))


class Concatenation:
    """Joins items that are chosen by number, far faster than ``bytes.join``: for made text of any size."""

    def __init__(self, items: Sequence[bytes]) -> None:
        self._bytes = np.frombuffer(b"".join(items), dtype=np.uint8)
        self._starts = np.cumsum([0, *map(len, items)], dtype=np.int64)

    def join(self, chosen: np.ndarray) -> bytes:
        """``chosen``: int32 [N], numbers of items."""
        room = int((self._starts[chosen + 1] - self._starts[chosen]).sum())
        target = np.empty(room, dtype=np.uint8)
        addresses = (array.ctypes.data for array in (self._bytes, self._starts, chosen))
        used = require().xvt_concatenate(*addresses, len(chosen), target.ctypes.data, room)
        assert used == room
        return target.tobytes()


def _paths(sources: Sequence[Path]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(sources))(*[os.fsencode(source) for source in sources])


def _check(code: int, path: Path) -> None:
    if code == 0:
        return
    if code == errno.ENOMEM:
        raise UserError("not enough memory for the words of these texts; give fewer of them")
    if code == errno.EOVERFLOW:
        raise UserError(
            "too many different words for one training (4 × 10⁹ characters of them); give less text"
        )
    if code == errno.EBADMSG:
        raise UserError(f"{path}: not a file of counted words, or a broken one; remove it and count again")
    raise OSError(code, os.strerror(code), str(path))
