"""Mixtures: which source the n-th sequence of a run comes from, as a pure function of (seed, n)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from xverse.config import UserError, nearest
from xverse.data.order import random_order

BLOCK = 1_000
PERIOD = 1_000_000
OTHERS = "*"


@dataclass
class MixtureConfig:
    """How often each source is drawn.

    ``weights`` by source; ``*`` stands for every source that is not named, and its weight is divided among
    them by size ** ``temperature``. Sources that no key covers are not drawn. Without weights every source
    is drawn by size ** ``temperature`` (1, the default: as it comes; 0: all alike).
    """

    weights: dict[str, float] | None = None
    temperature: float | None = None

    def resolve(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """A weight for every source of ``sizes``. Raises UserError for unknown or impossible weights."""
        power = 1.0 if self.temperature is None else self.temperature
        if not 0 <= power <= 1:
            raise UserError(f"mixture: temperature {power} is not between 0 and 1")
        weights = {OTHERS: 1.0} if self.weights is None else dict(self.weights)
        rest = weights.pop(OTHERS, 0.0)
        check_weights({**weights, OTHERS: rest}, [*sizes, OTHERS])
        scaled = {name: float(size) ** power for name, size in sizes.items() if name not in weights}
        total = sum(scaled.values())
        others = {name: rest * value / total for name, value in scaled.items()}
        return {name: weights.get(name, others.get(name, 0.0)) for name in sizes}


def check_weights(weights: Mapping[str, float], sources: list[str]) -> None:
    """Raises UserError for a source that does not exist, a negative weight, or weights that are all zero."""
    for name, weight in weights.items():
        if name not in sources:
            raise UserError(f"mixture: unknown source '{name}'{nearest(name, sources)}")
        if not 0 <= weight < float("inf"):
            raise UserError(f"mixture: the weight of '{name}' is {weight}; weights are 0 or more")
    if not any(weights.values()):
        raise UserError("mixture: every weight is zero")


class Mixture:
    """Deals sequences out to sources.

    In each period of 1,000,000 sequences every source has its share to the nearest sequence, spread evenly;
    each block of 1,000 is shuffled by (seed, block). ``sizes`` (sequences in one epoch of the source) serves
    to say how many epochs a run makes.
    """

    def __init__(self, weights: Mapping[str, float], sizes: Mapping[str, int], seed: int) -> None:
        check_weights(weights, list(sizes))
        self.seed = seed
        self.sizes = dict(sizes)
        self.names = [name for name, weight in weights.items() if weight > 0]
        self.counts = _apportion(np.array([weights[name] for name in self.names], np.float64))
        # The j-th of a source's c draws stands at time (j + offset) / c; sorting by time spreads all evenly.
        source = np.repeat(np.arange(len(self.names), dtype=np.int32), self.counts)
        first = np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
        offset = (source + 0.5) / len(self.names)
        time = (np.arange(PERIOD) - first + offset) / np.repeat(self.counts, self.counts)
        self._slots = source[np.argsort(time, kind="stable")].reshape(-1, BLOCK)  # [PERIOD / BLOCK, BLOCK]
        dealt = np.stack([np.bincount(slots, minlength=len(self.names)) for slots in self._slots])
        self._before = np.cumsum(dealt, axis=0) - dealt  # [PERIOD / BLOCK, sources]
        self._block = lru_cache(maxsize=8)(self._make_block)

    def _make_block(self, block: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        period, row = divmod(block, PERIOD // BLOCK)
        slots = self._slots[row][random_order(BLOCK, "mixture", self.seed, block)]
        drawn = np.empty(BLOCK, np.int64)
        for index in np.unique(slots):
            places = np.flatnonzero(slots == index)
            drawn[places] = period * self.counts[index] + self._before[row, index] + np.arange(len(places))
        return slots, drawn

    def locate(self, n: int) -> tuple[str, int]:
        """The source of the run's n-th sequence, and that it is the k-th drawn from there (both from 0)."""
        assert n >= 0
        slots, drawn = self._block(n // BLOCK)
        return self.names[slots[n % BLOCK]], int(drawn[n % BLOCK])

    def shares(self) -> dict[str, float]:
        """The share of the sequences that each source with a positive weight has, in all 1."""
        return {name: int(count) / PERIOD for name, count in zip(self.names, self.counts, strict=True)}

    def __str__(self) -> str:
        """One line: the largest sources and what is left for the others."""
        ranked = sorted(self.shares().items(), key=lambda item: -item[1])
        parts = [f"{name} {100 * share:.1f} %" for name, share in ranked[:5]]
        if len(ranked) > 5:
            rest = sum(share for _, share in ranked[5:])
            parts.append(f"{len(ranked) - 5} others {100 * rest:.1f} %")
        return f"mixture of {len(ranked)} sources ({', '.join(parts)})"

    def epochs(self, sequences: int) -> dict[str, float]:
        """How many times a run of so many sequences goes through each source."""
        return {name: share * sequences / max(1, self.sizes[name]) for name, share in self.shares().items()}


def _apportion(weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Integers that sum to PERIOD in proportion to positive weights (largest remainder), none of them 0."""
    exact = weights / weights.sum() * PERIOD
    counts = np.floor(exact).astype(np.int64)
    leftover = PERIOD - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:leftover]] += 1
    for index in np.flatnonzero(counts == 0):  # drawn once in a million rather than never
        counts[index] += 1
        counts[counts.argmax()] -= 1
    return counts
