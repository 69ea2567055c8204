"""Duplicates: exact ones by a hash of the text, near ones by their signatures (``signatures.py``).

A job compares the documents whose hashes fall into one part of the range, for the whole texts or for one
band; the number of parts follows the number of documents, so that a job takes bounded memory. The first of a
group of copies is kept, in the order of the files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xverse.data.prepare.keys import Keys
from xverse.data.prepare.signatures import BANDS, PERMUTATIONS, band_hashes

EXACT, NEAR = 1, 2
PART = 8_000_000  # documents of a job, about
COMPARED = 65_536  # pairs of signatures at a time
CHUNK = 4_000_000  # documents at a time
Pairs = NDArray[np.int64]  # [pairs, 2]


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


def jobs(documents: int, near: bool) -> list[tuple[int, int, int]]:
    """The jobs of a run: (band, or -1 for whole texts; part; parts)."""
    parts = max(1, -(-documents // PART))
    return [(row, part, parts) for row in (-1, *(range(BANDS) if near else ())) for part in range(parts)]


def exact_pairs(keys: Keys, part: int, parts: int) -> Pairs:
    """Pairs (first, copy) of equal texts."""
    hashes, owners = keys.slice("texts", 0, part, parts)
    pairs = np.stack([owners[_firsts(hashes)], owners], axis=1)
    return pairs[pairs[:, 0] != pairs[:, 1]]


def near_pairs(keys: Keys, band: int, part: int, parts: int, least: float) -> Pairs:
    """Pairs (earlier, copy) of texts that agree in a band and share at least ``least`` of their minima."""
    matches = [np.empty((0, 2), np.int64)]
    hashes, owners = keys.slice("bands", band, part, parts)
    filled = hashes != band_hashes(np.full(PERMUTATIONS, 2**32 - 1, np.uint32))[band]  # texts with words
    hashes, owners = hashes[filled], owners[filled]
    for _ in range(8):  # compare those unlike the first of their group with each other
        if len(hashes) < 2:
            break
        first = _firsts(hashes)
        rest = np.flatnonzero(first != np.arange(len(first)))
        pairs = np.stack([owners[first[rest]], owners[rest]], axis=1)
        alike = _alike(keys, pairs, least)
        matches.append(pairs[alike])
        hashes, owners = hashes[rest[~alike]], owners[rest[~alike]]
    return np.concatenate(matches)


def _alike(keys: Keys, pairs: Pairs, least: float) -> NDArray[np.bool_]:
    result = np.zeros(len(pairs), bool)
    order = np.argsort(pairs[:, 1], kind="stable")  # neighbours are in one file
    for start in range(0, len(pairs), COMPARED):
        some = order[start : start + COMPARED]
        numbers, places = np.unique(pairs[some], return_inverse=True)
        signatures, places = keys.signatures(numbers), places.reshape(-1, 2)
        equal = signatures[places[:, 0]] == signatures[places[:, 1]]
        result[some] = equal.mean(axis=1) >= least
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


def choose_copies(count: int, copies: Iterable[tuple[Pairs, Pairs]]) -> NDArray[np.uint8]:
    """The fate of each of ``count`` documents, uint8: 0 (kept), or EXACT or NEAR copy of an earlier one.

    ``copies``: pairs of exact and near copies, iterated more than once. Documents connected by pairs form a
    group, of which the first is kept. Takes 5 or 9 bytes for each document, and the pairs one by one.
    """
    kind = np.uint32 if count < 2**32 else np.uint64
    group = np.arange(count, dtype=kind)
    changed = True
    while changed:
        changed = False
        for pairs in (pairs for both in copies for pairs in both if len(pairs)):
            one, two = pairs[:, 0], pairs[:, 1]
            tops = group[one].astype(np.int64), group[two].astype(np.int64)
            changed = changed or bool(np.any(tops[0] != tops[1]))
            low = np.minimum(*tops).astype(kind)
            for numbers in (*tops, one, two):
                np.minimum.at(group, numbers, low)
        for start in range(0, count, CHUNK):  # follow the links to the first, all in place
            part = group[start : start + CHUNK]
            while np.any((further := group[part]) != part):
                part[:] = further
    fate = np.zeros(count, np.uint8)
    for start in range(0, count, CHUNK):
        part = group[start : start + CHUNK]
        fate[start : start + CHUNK][part != np.arange(start, start + len(part), dtype=kind)] = NEAR
    for exact, _ in copies:
        fate[exact[:, 1]] = EXACT
    return fate
