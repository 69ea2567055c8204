"""Signatures of texts: MinHash (Broder 1997) with banding.

A text is represented by the set of its word 5-grams (character 5-grams in scripts without spaces, see
``ngrams.py``). 256 minima of hashes estimate the Jaccard index of two texts, with a standard deviation of
0.025 at 0.8. Texts that agree in all 8 minima of one of 32 bands are compared: the probability of that is
0.997 at a Jaccard index of 0.8, and 0.12 at 0.5. A pair counts from two standard deviations below the
threshold.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xverse.data.prepare.ngrams import ngrams

NGRAM = 5
PERMUTATIONS, BANDS = 256, 32
ROWS = PERMUTATIONS // BANDS
_CHUNK = 512


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
