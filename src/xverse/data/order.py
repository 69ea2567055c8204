"""Permutations that are pure functions of their keys, the same with every machine and library version."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def random_order(count: int, *key: int | str) -> NDArray[np.int64]:
    """A permutation of ``range(count)`` that depends on ``key`` only, int64 [count].

    The sort keys come from SplitMix64 (Steele, Lea and Flood 2014), because the streams of numpy's generators
    may change between versions, and the order of training data must not.
    """
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    start = np.uint64(int.from_bytes(digest, "little"))
    with np.errstate(over="ignore"):
        state = start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return np.argsort(state, kind="stable")
