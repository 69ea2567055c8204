"""Corrections, calibration and power, against values by hand and by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from xverse.eval.adaptive import sequential
from xverse.eval.statistics import calibration_error, holm, paired, questions_needed


def test_holms_correction() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_calibration_error() -> None:
    assert calibration_error([0.95] * 20, [True] * 19 + [False]) == pytest.approx(0.0)
    assert calibration_error([0.9, 0.9, 0.3, 0.3], [True, False, False, False]) == pytest.approx(0.35)
    assert calibration_error([1.0, 1.0], [False, False]) == 1.0


def test_the_questions_that_are_needed_do_suffice() -> None:
    draw, differ, points = np.random.default_rng(0), 0.2, 5.0
    count = questions_needed(differ, points)
    found = 0
    for _ in range(400):
        kinds = draw.choice(3, count, p=[differ / 2 - points / 200, differ / 2 + points / 200, 1 - differ])
        found += paired((kinds == 0).tolist(), (kinds == 1).tolist()).p < 0.05
    assert 0.72 < found / 400 < 0.88  # McNemar's exact test is a little conservative


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_sequential_samples_are_small_and_their_intervals_hold(average: str) -> None:
    """Of 57 subjects as in MMLU, with a tenth of the questions or less."""
    draw = np.random.default_rng(1)
    sizes = {f"s{i}": int(size) for i, size in enumerate(draw.integers(100, 400, 56))} | {"law": 1500}
    covered = 0
    for _ in range(200):
        rates = draw.beta(2, 2, len(sizes)) * 0.6 + draw.uniform(0.0, 0.4)
        truth = {
            name: draw.random(size) < rate for (name, size), rate in zip(sizes.items(), rates, strict=True)
        }
        result = sequential(
            sizes, average, 0.015, lambda counts, t=truth: {n: t[n][:c].tolist() for n, c in counts.items()}
        )
        means = [answers.mean() for answers in truth.values()]
        weights = list(sizes.values()) if average == "micro" else None
        expected = np.average(means, weights=weights)
        assert result.error <= 0.015
        assert result.count <= 0.1 * sum(sizes.values())
        covered += result.low <= expected <= result.high
    assert covered >= 190


def test_a_small_benchmark_is_answered_whole() -> None:
    sizes = {"a": 3, "b": 2}
    asked: list[dict[str, int]] = []

    def answer(counts: dict[str, int]) -> dict[str, list[bool]]:
        asked.append(counts)
        return {name: [True] * count for name, count in counts.items()}

    result = sequential(sizes, "micro", 0.001, answer)
    assert asked[-1] == sizes
    assert (result.value, result.error, result.count) == (1.0, 0.0, 5)
