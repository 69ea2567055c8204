"""Accuracies with standard errors and bootstrap intervals, and paired tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Score:
    """``value`` in 0 to 1, its standard error, and a 95 % bootstrap interval (resampled within subjects)."""

    value: float
    error: float
    low: float
    high: float
    count: int


def score(right: Mapping[str, Sequence[bool]], average: Literal["micro", "macro"], seed: int = 0) -> Score:
    """The score of a task from its subjects' right and wrong answers."""
    groups = [np.asarray(values, dtype=float) for values in right.values() if len(values)]
    if not groups:
        return Score(math.nan, math.nan, math.nan, math.nan, 0)
    sizes = np.array([len(group) for group in groups])
    means = np.array([group.mean() for group in groups])
    weights = sizes / sizes.sum() if average == "micro" else np.full(len(groups), 1 / len(groups))
    if average == "micro":
        value = float((means * weights).sum())
        error = math.sqrt(value * (1 - value) / sizes.sum())
    else:
        value = float(means.mean())
        error = math.sqrt(float((weights**2 * means * (1 - means) / sizes).sum()))
    # The number of right answers in a resample of a subject is binomial.
    generator = np.random.default_rng(seed)
    drawn = generator.binomial(sizes, means, (RESAMPLES, len(groups))) / sizes
    low, high = np.quantile((drawn * weights).sum(axis=1), [0.025, 0.975])
    return Score(value, error, float(low), float(high), int(sizes.sum()))


@dataclass(frozen=True)
class Paired:
    """Two models on the same questions. ``p``: from the exact two-sided McNemar test."""

    first: float
    second: float
    only_first: int  # questions that only the first answered right
    only_second: int
    count: int
    low: float  # 95 % bootstrap interval of second - first
    high: float
    p: float


def paired(first: Sequence[bool], second: Sequence[bool], seed: int = 0) -> Paired:
    """The exact McNemar test (1947): where two equal models differ, each is right half of the time."""
    assert len(first) == len(second) > 0
    one, other = np.asarray(first, dtype=int), np.asarray(second, dtype=int)
    only_first, only_second = int((one > other).sum()), int((other > one).sum())
    differ = only_first + only_second
    fewer = min(only_first, only_second)
    p = min(1.0, 2 * sum(math.comb(differ, k) for k in range(fewer + 1)) / 2**differ) if differ else 1.0
    generator = np.random.default_rng(seed)
    shares = [only_first / len(one), only_second / len(one)]
    drawn = generator.multinomial(len(one), [*shares, 1 - sum(shares)], RESAMPLES)
    low, high = np.quantile((drawn[:, 1] - drawn[:, 0]) / len(one), [0.025, 0.975])
    return Paired(
        first=float(one.mean()),
        second=float(other.mean()),
        only_first=only_first,
        only_second=only_second,
        count=len(one),
        low=float(low),
        high=float(high),
        p=p,
    )


def holm(values: Sequence[float]) -> list[float]:
    """p-values of several tests, corrected by Holm's method (1979): if no test has an effect, the probability
    that any falls below a level is at most that level."""
    adjusted = [0.0] * len(values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted


def calibration_error(confidences: Sequence[float], right: Sequence[bool], bins: int = 10) -> float:
    """The expected calibration error (Naeini et al., 2015): the mean distance between confidence and accuracy
    over ``bins`` of equal width, weighted by their sizes. ``confidences`` are in 0 to 1."""
    assert len(confidences) == len(right) > 0
    values, hits = np.asarray(confidences), np.asarray(right, dtype=float)
    place = np.minimum((values * bins).astype(int), bins - 1)
    gaps = np.abs(np.bincount(place, hits - values, bins))
    return float(gaps.sum() / len(values))


def questions_needed(differ: float, points: float = 1.0) -> int:
    """How many questions show a difference of ``points`` percentage points at the level of 5 % with a power
    of 80 %, if two models are right on different questions in a share ``differ`` of them (the normal
    approximation of McNemar's test; Connor, 1987)."""
    effect = points / 100
    spread = max(differ, effect)
    z = 1.959964 * math.sqrt(spread) + 0.841621 * math.sqrt(max(0.0, spread - effect**2))
    return math.ceil((z / effect) ** 2)
