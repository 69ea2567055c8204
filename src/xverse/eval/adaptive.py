"""Sequential sampling: a benchmark's score from as many questions as a standard error needs.

Questions are drawn at random from all subjects until the standard error is small enough. Its interval is a
confidence sequence (Waudby-Smith et al., 2021, arXiv:2103.06476): valid at every number of questions at once,
so that stopping by what was seen does not narrow it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from xverse.eval.statistics import Score

ROUNDS = 8  # in which a sample that is as uncertain as possible becomes precise enough
LEVEL = 0.05
Average = Literal["micro", "macro"]
Right = Mapping[str, Sequence[bool]]


def sequential(
    sizes: Mapping[str, int], average: Average, error: float, answer: Callable[[dict[str, int]], Right]
) -> Score:
    """Ask for more of a benchmark's questions until the standard error is at most ``error``.

    ``sizes``: questions of each subject. ``answer(counts)``: whether the first ``counts[subject]`` questions
    of each, in a random order, were answered right; counts only grow.
    """
    planned = needed(sum(sizes.values()), error)
    for number in range(1, ROUNDS * len(sizes) + 10 * ROUNDS):
        counts = allocation(sizes, average, math.ceil(number * planned / ROUNDS))
        result = estimate(answer(counts), sizes, average, planned)
        if result.error <= error or counts == dict(sizes):
            return result
    counts = dict(sizes)
    return estimate(answer(counts), sizes, average, planned)


def needed(total: int, error: float) -> int:
    """Questions that give a standard error if half of the answers are right, of ``total``."""
    return math.ceil(1 / (error**2 / 0.25 + 1 / total))


def allocation(sizes: Mapping[str, int], average: Average, count: int) -> dict[str, int]:
    """Shares of about ``count`` questions: by a subject's size, or equal where subjects count equally; two of
    each at least."""
    total = sum(sizes.values())
    share = {
        name: size * count / total if average == "micro" else count / len(sizes)
        for name, size in sizes.items()
    }
    return {name: min(size, max(2, math.ceil(share[name]))) for name, size in sizes.items()}


def estimate(right: Right, sizes: Mapping[str, int], average: Average, planned: int) -> Score:
    """The score of a whole benchmark from a sample of each subject, its standard error, and the interval of
    the confidence sequence, which is narrowest near ``planned`` questions.

    The variance within a subject is that of (right + 1) / (count + 2) (Agresti and Coull, 1998): a few equal
    answers do not mean that there is none.
    """
    total, count, value, variance = sum(sizes.values()), 0, 0.0, 0.0
    for name, size in sizes.items():
        answers = right[name]
        drawn, hits = len(answers), sum(answers)
        weight = size / total if average == "micro" else 1 / len(sizes)
        smoothed = (hits + 1) / (drawn + 2)
        value += weight * hits / drawn
        variance += weight**2 * smoothed * (1 - smoothed) / drawn * (1 - drawn / size)
        count += drawn
    error = math.sqrt(variance)
    tuned = -2 * math.log(LEVEL) + math.log(-2 * math.log(LEVEL)) + 1  # rho^2 · planned, its section 3.5
    scaled = tuned * count / planned  # rho^2 · count
    width = error * math.sqrt((1 + 1 / scaled) * math.log((scaled + 1) / LEVEL**2))
    return Score(value, error, max(0.0, value - width), min(1.0, value + width), count)
