"""Mixtures: the source of a run's n-th sequence, as a pure function of (seed, n)."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xverse.config import UserError, load, nearest
from xverse.data.order import random_order

BLOCK = 1_000
PERIOD = 1_000_000
OTHERS = "*"


@dataclass
class Shares:
    """How often each source is drawn, in one stage of a run.

    Either ``weights``: shares of sources by name; or ``categories``: shares of categories, and ``languages``:
    shares of languages within every category that has any of them. ``*`` means all others. Without shares,
    sources are drawn in proportion to size ** ``temperature`` (default 1: by size; 0: equally), and so is the
    share of ``*`` divided. Given shares must sum to 1 or to 100. Sources that no key covers are not drawn.
    With ``allow_absent``, names that the data lacks are left out, and the others share what they had.
    """

    weights: dict[str, float] | None = None
    temperature: float | None = None
    categories: dict[str, float] | None = None
    languages: dict[str, float] | None = None
    allow_absent: bool = False

    def resolve(self, sizes: Mapping[str, int], kinds: Kinds | None = None) -> dict[str, float]:
        """The weight of every source in ``sizes``; ``kinds``: (category, language) of each.

        Raises UserError for unknown names and invalid weights.
        """
        power = 1.0 if self.temperature is None else self.temperature
        if not 0 <= power <= 1:
            raise UserError(f"mixture: temperature {power} is not between 0 and 1")
        scaled = {name: float(size) ** power for name, size in sizes.items()}
        if self.categories is None and self.languages is None:
            weights = self._present(self.weights, sizes, "source")
            return _divide(weights, {name: name for name in sizes}, scaled, "source")
        if self.weights is not None:
            raise UserError("mixture: give either weights, or categories and languages")
        kinds = kinds or {name: ("text", name) for name in sizes}
        category = {name: kinds[name][0] for name in sizes}
        language = {name: kinds[name][1] for name in sizes}
        languages = self._present(self.languages, language.values(), "language")
        if languages is not None:
            check_weights(languages, [*language.values(), OTHERS], "language", summing=True)
            for group in set(category.values()):
                mine = {name: scaled[name] for name in sizes if category[name] == group}
                # A category without any of the named languages, such as code, is divided by size.
                if OTHERS in languages or any(language[name] in languages for name in mine):
                    named = {language[name]: languages.get(language[name], 0.0) for name in mine}
                    named = {key: value for key, value in named.items() if key in languages}
                    rest = languages.get(OTHERS, 0.0)
                    if rest or any(named.values()):
                        scaled |= _divide({**named, OTHERS: rest}, language, mine, "language", summing=False)
                    else:
                        scaled |= dict.fromkeys(mine, 0.0)
        categories = self._present(self.categories, category.values(), "category")
        return _divide(categories, category, scaled, "category")

    def _present(
        self, shares: Mapping[str, float] | None, known: Collection[str], what: str
    ) -> Mapping[str, float] | None:
        """The shares of names that the data has, with the sum of all; raises UserError if there are none."""
        if shares is None or not self.allow_absent:
            return shares
        left = {name: share for name, share in shares.items() if name in known or name == OTHERS}
        if not sum(left.values()):
            raise UserError(f"mixture: the data has none of the {what} names given ({', '.join(shares)})")
        return {name: share * sum(shares.values()) / sum(left.values()) for name, share in left.items()}


@dataclass
class MixtureStage(Shares):
    """Shares from a step of the run onwards."""

    from_step: int = 0


@dataclass
class MixtureConfig(Shares):
    """How often each source is drawn in a run: ``Shares`` with caps and stages.

    ``epochs``: maximum number of passes over a source, by source or ``*``; the other sources receive the
    excess. ``stages`` replace the shares from their steps onwards. ``file``: a YAML file with these keys.
    """

    epochs: dict[str, float] = field(default_factory=dict)
    stages: list[MixtureStage] = field(default_factory=list)
    file: Path | None = None

    def read(self) -> MixtureConfig:
        """The mixture in ``file``, or this one. Raises UserError if both are given."""
        if self.file is None:
            return self
        if self != MixtureConfig(file=self.file):
            raise UserError("mixture: file and other keys are mutually exclusive")
        return load(MixtureConfig, self.file)

    def build(
        self,
        sizes: Mapping[str, int],
        lengths: Mapping[str, int],
        kinds: Kinds,
        seed: int,
        sequences: int = 0,
        before: Callable[[int], int] | None = None,
    ) -> Mixture | Schedule:
        """The mixture of a run of ``sequences`` (0: unknown, caps do not apply), ``before(step)`` of them
        before a step.

        ``sizes``: tokens of each source; ``lengths``: sequences of its epoch. Raises UserError as ``resolve``
        does, for stages out of order, and for caps that leave too little to draw.
        """
        stages: list[Shares] = [self, *self.stages]
        steps = [0, *(stage.from_step for stage in self.stages)]
        if any(after <= before for before, after in itertools.pairwise(steps)):
            raise UserError("mixture: from_step of the stages must increase, starting above 0")
        if len(stages) > 1 and before is None:
            raise UserError("mixture: stages need a pretraining recipe, because they count steps")
        starts = [before(step) if before else 0 for step in steps]
        if len(stages) > 1 and sequences and starts[-1] >= sequences:
            raise UserError(f"mixture: a stage begins at step {steps[-1]}, after the end of the run")
        weights = [stage.resolve(sizes, kinds) for stage in stages]
        if self.epochs and sequences:
            weights = self._capped(weights, [*starts, sequences], lengths)
        if len(stages) == 1:
            return Mixture(weights[0], lengths, seed)
        parts = [Mixture(shares, lengths, seed, stage) for stage, shares in enumerate(weights)]
        return Schedule(parts, starts, sequences)

    def _capped(
        self, weights: list[dict[str, float]], bounds: list[int], lengths: Mapping[str, int]
    ) -> list[dict[str, float]]:
        names = [*lengths]
        check_weights(self.epochs, [*names, OTHERS])
        caps = {name: self.epochs.get(name, self.epochs.get(OTHERS, float("inf"))) for name in names}
        left = {name: caps[name] * lengths[name] for name in names}
        capped = []
        for stage, (start, stop) in zip(weights, itertools.pairwise(bounds), strict=True):
            capped.append(_cap(stage, {name: left[name] / (stop - start) for name in names}))
            for name, share in capped[-1].items():
                left[name] = max(0.0, left[name] - share * (stop - start))
        return capped


Kinds = Mapping[str, tuple[str, str]]


def _divide(
    shares: Mapping[str, float] | None,
    group: Mapping[str, str],
    scaled: Mapping[str, float],
    what: str,
    summing: bool = True,
) -> dict[str, float]:
    """Weights of sources: the share of each source's group, divided in it in proportion to ``scaled``."""
    explicit = {OTHERS: 1.0} if shares is None else dict(shares)
    rest = explicit.pop(OTHERS, 0.0)
    check_weights({**explicit, OTHERS: rest}, [*(group[name] for name in scaled), OTHERS], what, summing)
    keys = {name: group[name] if group[name] in explicit else OTHERS for name in scaled}
    totals: dict[str, float] = {}
    for name, value in scaled.items():
        totals[keys[name]] = totals.get(keys[name], 0.0) + value
    result = {}
    for name, value in scaled.items():
        share, whole = explicit.get(keys[name], rest), totals[keys[name]]
        alone = value == whole and keys[name] != OTHERS
        result[name] = 0.0 if value == 0 else share if alone else share * value / whole
    return result


def _cap(weights: Mapping[str, float], most: Mapping[str, float]) -> dict[str, float]:
    """Shares in proportion to weights, none above its ``most``. Raises UserError if they cannot sum to 1."""
    if sum(most[name] for name, weight in weights.items() if weight > 0) < 1 - 1e-9:
        raise UserError(
            "mixture: the caps in epochs leave too little text for the run; raise them or shorten the run"
        )
    total = sum(weights.values())
    shares = {name: weight / total for name, weight in weights.items()}
    fixed: set[str] = set()
    while over := {name for name in shares if name not in fixed and shares[name] > most[name] * (1 + 1e-12)}:
        fixed |= over
        free = sum(weight for name, weight in weights.items() if name not in fixed)
        rest = 1 - sum(most[name] for name in fixed)
        shares = {
            name: most[name] if name in fixed else rest * weight / free if free else 0.0
            for name, weight in weights.items()
        }
    return shares


def check_weights(
    weights: Mapping[str, float], known: list[str], what: str = "source", summing: bool = False
) -> None:
    """Raise UserError for unknown names, negative weights, or weights that are all zero.

    With ``summing``, also for weights that do not sum to 1 or 100, within 0.5 %.
    """
    for name, weight in weights.items():
        if name not in known:
            there = ", ".join(sorted(set(known) - {OTHERS}))
            fix = "remove it, or set allow_absent: true in the mixture, which gives its share to the others"
            hint = nearest(name, known) or f" (the data has {there}); {fix}"
            raise UserError(f"mixture: unknown {what} '{name}'{hint}")
        if not 0 <= weight < float("inf"):
            raise UserError(f"mixture: the weight of '{name}' is {weight}; weights must not be negative")
    total = sum(weights.values())
    if weights and total == 0:
        raise UserError("mixture: every weight is zero")
    if summing and not (abs(total - 1) <= 0.005 or abs(total - 100) <= 0.5):
        raise UserError(f"mixture: the weights by {what} sum to {total:g}, not to 1 or 100")


class Mixture:
    """Distributes sequences to sources.

    In each period of 1,000,000 sequences every source has its share to the nearest sequence, spread evenly;
    each block of 1,000 is shuffled by (seed, block). ``sizes``: sequences in an epoch of each source, for
    reporting epochs.
    """

    def __init__(
        self, weights: Mapping[str, float], sizes: Mapping[str, int], seed: int, stage: int = 0
    ) -> None:
        check_weights(weights, list(sizes))
        self.seed = seed
        self._key = ("mixture", seed) if stage == 0 else ("mixture", seed, "stage", stage)
        self.sizes = dict(sizes)
        self.names = [name for name, weight in weights.items() if weight > 0]
        self.counts = _apportion(np.array([weights[name] for name in self.names], np.float64))
        # The j-th of a source's c draws has time (j + offset) / c; sorting by time spreads all evenly.
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
        slots = self._slots[row][random_order(BLOCK, *self._key, block)]
        drawn = np.empty(BLOCK, np.int64)
        for index in np.unique(slots):
            places = np.flatnonzero(slots == index)
            drawn[places] = period * self.counts[index] + self._before[row, index] + np.arange(len(places))
        return slots, drawn

    def locate(self, n: int) -> tuple[str, int]:
        """The source of the run's n-th sequence, and its number k among those of the source (both from 0)."""
        assert n >= 0
        slots, drawn = self._block(n // BLOCK)
        return self.names[slots[n % BLOCK]], int(drawn[n % BLOCK])

    def drawn(self, count: int) -> dict[str, int]:
        """The number of draws of each source among the first ``count`` sequences."""
        block, inside = divmod(count, BLOCK)
        period, row = divmod(block, PERIOD // BLOCK)
        totals = period * self.counts + self._before[row]
        if inside:
            totals = totals + np.bincount(self._block(block)[0][:inside], minlength=len(self.names))
        return {name: int(total) for name, total in zip(self.names, totals, strict=True)}

    def simulate(self, count: int = PERIOD) -> dict[str, float]:
        """The share of each source among the first ``count`` sequences, by drawing them."""
        totals = np.zeros(len(self.names), np.int64)
        for block in range(-(-count // BLOCK)):
            slots = self._make_block(block)[0][: count - block * BLOCK]
            totals += np.bincount(slots, minlength=len(self.names))
        return {name: int(total) / count for name, total in zip(self.names, totals, strict=True)}

    def identity(self) -> dict[str, Any]:
        """Everything that the order depends on besides the seed."""
        return self.shares()

    def shares(self) -> dict[str, float]:
        """The share of sequences of each source with a positive weight; they sum to 1."""
        return {name: int(count) / PERIOD for name, count in zip(self.names, self.counts, strict=True)}

    def __str__(self) -> str:
        """One line: the largest sources and the share of the others."""
        ranked = sorted(self.shares().items(), key=lambda item: -item[1])
        parts = [f"{name} {100 * share:.1f} %" for name, share in ranked[:5]]
        if len(ranked) > 5:
            rest = sum(share for _, share in ranked[5:])
            parts.append(f"{len(ranked) - 5} others {100 * rest:.1f} %")
        return f"mixture of {len(ranked)} sources ({', '.join(parts)})"

    def epochs(self, sequences: int) -> dict[str, float]:
        """The number of epochs of each source in a run of ``sequences``."""
        return {name: share * sequences / max(1, self.sizes[name]) for name, share in self.shares().items()}


class Schedule:
    """Consecutive mixtures: part ``i`` begins at sequence ``starts[i]`` of a run of ``sequences``.

    A part continues each source where the previous one stopped.
    """

    def __init__(self, parts: list[Mixture], starts: list[int], sequences: int) -> None:
        self.parts, self.starts, self.sequences = parts, starts, sequences
        self.sizes = parts[0].sizes
        self._before: list[dict[str, int]] = [{}]
        for part, (start, stop) in zip(parts, itertools.pairwise(starts), strict=False):
            before, drawn = self._before[-1], part.drawn(stop - start)
            self._before.append({name: before.get(name, 0) + drawn.get(name, 0) for name in self.sizes})

    def locate(self, n: int) -> tuple[str, int]:
        """The source of the run's n-th sequence, and its number k among those of the source (both from 0)."""
        index = bisect.bisect_right(self.starts, n) - 1
        source, k = self.parts[index].locate(n - self.starts[index])
        return source, k + self._before[index].get(source, 0)

    def shares(self) -> dict[str, float]:
        """The share of each source in the run's sequences; in part 0 if the run's length is unknown."""
        if not self.sequences:
            return self.parts[0].shares()
        drawn = self._totals(self.sequences)
        return {name: count / self.sequences for name, count in drawn.items() if count}

    def epochs(self, sequences: int) -> dict[str, float]:
        """The number of epochs of each source in a run of ``sequences``."""
        return {name: n / max(1, self.sizes[name]) for name, n in self._totals(sequences).items() if n}

    def _totals(self, count: int) -> dict[str, int]:
        index = bisect.bisect_left(self.starts, count, 1) - 1
        drawn = self.parts[index].drawn(count - self.starts[index])
        return {name: self._before[index].get(name, 0) + drawn.get(name, 0) for name in self.sizes}

    def identity(self) -> dict[str, Any]:
        """Everything that the order depends on besides the seed."""
        return {f"from {start}": part.shares() for start, part in zip(self.starts, self.parts, strict=True)}

    def __str__(self) -> str:
        return "; ".join(
            f"from {start:,} {part}" for start, part in zip(self.starts, self.parts, strict=True)
        )


def _apportion(weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Positive integers that sum to PERIOD in proportion to weights float64 [sources] (largest remainder)."""
    exact = weights / weights.sum() * PERIOD
    counts = np.floor(exact).astype(np.int64)
    leftover = PERIOD - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:leftover]] += 1
    for index in np.flatnonzero(counts == 0):  # at least once in a million
        counts[index] += 1
        counts[counts.argmax()] -= 1
    return counts
