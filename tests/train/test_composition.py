"""Layouts and methods in combinations drawn at random compute what one process computes.

``XVERSE_COMPOSITION=N`` draws N cases by the day's seed; without it the first cases of a fixed seed run.
``python -m benchmarks composition`` draws 500. Cases that were once wrong are below, by name.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.studies import composition
from tests import forkserver
from tests.scale import ALL

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
COUNT = int(os.environ.get("XVERSE_COMPOSITION", "0"))
FIXED = 3 if ALL else 1  # cases of seed 1
NAMED: dict[str, dict[str, Any]] = {
    "a sharded adapter's reference in a row without examples": {
        "kind": "finetuning",
        "rows": 4,
        "common": {"stage": "dpo", "finetuning_type": "lora", "max_samples": 13},
        "phases": [{"processes": 2, "batch": 2, "accumulation": 1, "fsdp": True}],
    }
}


def test_cases_of_the_day() -> None:
    """In a process of their own: forking one that has run other tests would copy their threads' locks."""
    drawn = composition.draw(composition.today(), COUNT) if COUNT else composition.draw(1, FIXED)
    cases = [*NAMED.values(), *drawn]
    done = forkserver.run(
        [sys.executable, "-m", "benchmarks.studies.composition", json.dumps(cases)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60 + 60 * len(cases),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    faults = json.loads(done.stdout.splitlines()[-1])
    assert not faults, "\n".join(f"{problem}\n  {json.dumps(case)}" for case, problem in faults)


def test_a_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: other losses, another number of steps, a process that fails."""
    case = next(composition.draw(0, 1))
    curves = {"one": [(1.0, 0.5), (2.0, 0.4)], "other": [(1.0, 0.5), (2.0, 0.4)]}
    monkeypatch.setattr(composition, "_forked", lambda *_: "")
    monkeypatch.setattr(composition, "_figures", lambda out: curves[out.name])
    assert composition.problem_of(case) == ""
    curves["other"] = [(1.0, 0.5), (2.1, 0.4)]
    assert "step 1: loss" in composition.problem_of(case)
    curves["other"] = [(1.0, 0.5), (2.0, float("nan"))]
    assert "step 1: gradient" in composition.problem_of(case)
    curves["other"] = [(1.0, 0.5)]
    assert "1 steps" in composition.problem_of(case)
    monkeypatch.setattr(composition, "_forked", lambda *_: "ValueError: broken")
    assert "broken" in composition.problem_of(case)


def test_cases_follow_from_the_seed_and_differ() -> None:
    cases = [json.dumps(case) for case in composition.draw(3, 60)]
    assert cases == [json.dumps(case) for case in composition.draw(3, 60)]
    assert len(set(cases)) == 60
    text = "".join(cases)
    for part in (
        '"tensor": 2',
        '"context": 2',
        '"pipeline": 2',
        '"replicate": 2',
        '"ddp"',
        '"muon"',
        '"lora"',
    ):
        assert part in text, part
    for part in (
        '"packing": true',
        '"fsdp": true',
        '"use_dora": true',
        '"gradient_checkpointing": true',
        '"dpo"',
    ):
        assert part in text, part
