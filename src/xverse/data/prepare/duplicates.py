"""Duplicates: exact ones by a hash of the text, near ones by MinHash (Broder 1997) with banding.

A text is represented by the set of its word 5-grams (character 5-grams in scripts without spaces, see
``ngrams.py``). 256 minima of hashes estimate the Jaccard index of two texts, with a standard deviation of
0.025 at 0.8. Texts that agree in all 8 minima of one of 32 bands are compared: the probability of that is
0.997 at a Jaccard index of 0.8, and 0.12 at 0.5. A pair counts from two standard deviations below the
threshold.

Hashes and signatures are stored in arrays for each file; every task searches the arrays of all files for the
hashes that fall to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xverse.data.prepare.ngrams import ngrams

NGRAM = 5
PERMUTATIONS, BANDS = 256, 32
ROWS = PERMUTATIONS // BANDS
EXACT, NEAR = 1, 2
_CHUNK = 512
KEY = np.dtype([("text", "<u8"), ("bytes", "<i8"), ("source", "<i4")])


@dataclass
class DuplicatesStage:
    """``threshold``: the Jaccard index from which two documents count as copies."""

    threshold: float = 0.8

    def __post_init__(self) -> None:
        if not 0.5 <= self.threshold <= 1:
            raise ValueError(f"near_duplicates: threshold {self.threshold} is not between 0.5 and 1")

    @property
    def least(self) -> float:
        """The share of equal minima from which a pair counts."""
        return self.threshold - 2 * (self.threshold * (1 - self.threshold) / PERMUTATIONS) ** 0.5


def _multipliers() -> NDArray[np.uint64]:
    """Pairs of an odd multiplier and an addend, uint64 [2, PERMUTATIONS], by SplitMix64 from 1."""
    with np.errstate(over="ignore"):
        state = np.arange(1, 2 * PERMUTATIONS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = (state ^ (state >> np.uint64(31))).reshape(2, PERMUTATIONS)
    state[0] |= np.uint64(1)
    return state


_MULTIPLY, _ADD = _multipliers()


def shingles(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The distinct 5-grams, uint64, of hashed words, uint64 [words]; a shorter text is one gram."""
    return np.unique(ngrams(hashes, min(NGRAM, max(1, len(hashes)))))


def signature(hashes: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """The MinHash minima, uint32 [PERMUTATIONS], of hashed words, uint64 [words]; all 2**32 - 1 without
    words."""
    minima = np.full(PERMUTATIONS, 2**32 - 1, np.uint32)
    grams = shingles(hashes)
    with np.errstate(over="ignore"):
        for start in range(0, len(grams), _CHUNK):
            hashed = grams[start : start + _CHUNK] * _MULTIPLY[:, None]  # [PERMUTATIONS, chunk]
            hashed += _ADD[:, None]
            hashed >>= np.uint64(32)  # multiply-shift: Dietzfelbinger et al. 1997
            np.minimum(minima, hashed.min(axis=1).astype(np.uint32), out=minima)
    return minima


def band_hashes(minima: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """The hash of each band, uint64 [..., BANDS], of signatures uint32 [..., PERMUTATIONS]."""
    rows = minima.reshape(*minima.shape[:-1], BANDS, ROWS).astype(np.uint64)
    value = np.zeros(rows.shape[:-1], np.uint64)
    with np.errstate(over="ignore"):
        for row in range(ROWS):
            value = (value ^ rows[..., row]) * np.uint64(0x9E3779B97F4A7C15)
            value ^= value >> np.uint64(32)
    return value


class Documents:
    """Keys, bands and signatures of all documents, by file and memory-mapped.

    Documents are numbered through the files in order, independently of the tasks.
    """

    def __init__(self, folder: Path, files: int) -> None:
        self.folder = folder
        self.keys = [np.load(folder / f"{i:05d}.keys.npy", mmap_mode="r") for i in range(files)]
        self.starts = np.cumsum([0, *(len(keys) for keys in self.keys)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def texts(self, part: int, parts: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Hashes of the whole texts that fall to a part, uint64, and their documents, int64."""
        return self._part((keys["text"] for keys in self.keys), part, parts)

    def band(self, band: int, part: int, parts: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Hashes of one band that fall to a part, uint64, and their documents, int64, without texts of no
        words."""
        empty = band_hashes(np.full(PERMUTATIONS, 2**32 - 1, np.uint32))[band]
        arrays = (self._load(i, "bands")[band] for i in range(len(self.keys)))
        hashes, owners = self._part(arrays, part, parts)
        return hashes[hashes != empty], owners[hashes != empty]

    def _part(
        self, arrays: Iterator[NDArray[np.uint64]], part: int, parts: int
    ) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        hashes, owners = [], []
        for start, values in zip(self.starts, arrays, strict=False):
            mine = np.flatnonzero(np.asarray(values) % np.uint64(parts) == part)
            hashes.append(np.asarray(values)[mine])
            owners.append(mine + start)
        if not hashes:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        return np.concatenate(hashes), np.concatenate(owners).astype(np.int64)

    def signatures(self, numbers: NDArray[np.int64]) -> NDArray[np.uint16]:
        """The signatures of documents, uint16 [documents, PERMUTATIONS], the low half of each minimum."""
        result = np.empty((len(numbers), PERMUTATIONS), np.uint16)
        files = np.searchsorted(self.starts, numbers, side="right") - 1
        for i in np.unique(files):
            mine = files == i
            result[mine] = self._load(int(i), "signatures")[numbers[mine] - self.starts[i]]
        return result

    def _load(self, file: int, kind: str) -> NDArray[np.uint64]:
        array: NDArray[np.uint64] = np.load(self.folder / f"{file:05d}.{kind}.npy", mmap_mode="r")
        return array


def exact_pairs(documents: Documents, part: int, parts: int) -> NDArray[np.int64]:
    """Pairs (first, copy) of equal texts, int64 [pairs, 2]."""
    hashes, owners = documents.texts(part, parts)
    order = np.lexsort((owners, hashes))
    first = _firsts(hashes[order])
    pairs = np.stack([owners[order][first], owners[order]], axis=1)
    return pairs[pairs[:, 0] != pairs[:, 1]]


def near_pairs(documents: Documents, part: int, parts: int, least: float) -> NDArray[np.int64]:
    """Pairs (earlier, copy) of texts that share at least ``least`` of their minima, int64 [pairs, 2]."""
    matches = [np.empty((0, 2), np.int64)]
    for band in range(BANDS):
        hashes, owners = documents.band(band, part, parts)
        order = np.lexsort((owners, hashes))
        hashes, owners = hashes[order], owners[order]
        for _ in range(8):  # compare those unlike the first of their group with each other
            if len(hashes) < 2:
                break
            first = _firsts(hashes)
            rest = first != np.arange(len(first))
            pairs = np.stack([owners[first], owners], axis=1)[rest]
            alike = np.zeros(len(owners), bool)
            alike[rest] = _alike(documents, pairs, least)
            matches.append(pairs[alike[rest]])
            left = rest & ~alike
            hashes, owners = hashes[left], owners[left]
    return np.unique(np.concatenate(matches), axis=0)


def _alike(documents: Documents, pairs: NDArray[np.int64], least: float) -> NDArray[np.bool_]:
    result = np.zeros(len(pairs), bool)
    for start in range(0, len(pairs), 4096):
        some = pairs[start : start + 4096]
        equal = documents.signatures(some[:, 0]) == documents.signatures(some[:, 1])
        result[start : start + 4096] = equal.mean(axis=1) >= least
    return result


def _firsts(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each index of a sorted array, the first index with the same value, int64 [values]."""
    starts = (
        np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
        if len(values)
        else np.empty(0, int)
    )
    counts = np.diff(np.concatenate([starts, [len(values)]]))
    return np.repeat(starts, counts)


def choose_copies(count: int, exact: NDArray[np.int64], near: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The fate of each of ``count`` documents, uint8: 0 (kept), or EXACT or NEAR copy of an earlier one.

    Documents connected by pairs form a group, of which the first is kept.
    """
    group = np.arange(count)
    pairs = np.concatenate([exact, near]).astype(np.int64)
    while len(pairs):
        low = np.minimum(group[pairs[:, 0]], group[pairs[:, 1]])
        before = group.copy()
        for column in (0, 1):
            np.minimum.at(group, group[pairs[:, column]], low)
            np.minimum.at(group, pairs[:, column], low)
        group = group[group]
        if np.array_equal(group, before):
            break
    fate = np.where(group == np.arange(count), 0, NEAR).astype(np.uint8)
    fate[exact[:, 1]] = EXACT
    return fate
