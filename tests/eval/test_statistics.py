"""Corrections, calibration and power, against values by hand and by simulation."""

from __future__ import annotations

import numpy as np
import pytest

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
