"""The check before the first step, with real processes of which one does its work several times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xverse import hardware
from xverse.cli import main
from xverse.train.parallel import ALONE
from xverse.train.plot import read_metrics
from xverse.train.preflight import Reading, measure, slow

SLOW = """
import os, sys
from xverse import cli, hardware

time_each = hardware._time_each

def repeated(action, *arguments):
    return time_each(lambda: [action() for _ in range(24)], *arguments)

if os.environ["RANK"] == "1":
    hardware._time_each = repeated
sys.exit(cli.main(["pretrain", *sys.argv[1:]]))
"""


def reading(rank: int, **values: float) -> Reading:
    return Reading(rank, f"node-{rank}", "CPU", **{"matmul": 1e11, "memory": 1e10, "exchange": 1e9, **values})


def test_what_is_below_the_share_of_the_median_is_named() -> None:
    readings = [reading(0), reading(1, memory=4e9), reading(2, exchange=0.0), reading(3)]
    lines = slow(readings, 0.5)
    assert lines == [
        "rank 1 (node-1, CPU): memory 4 GB/s, 40 % of the median 10 GB/s",
        "rank 2 (node-2, CPU): exchange 0 GB/s, 0 % of the median 1 GB/s",
    ]
    assert slow([dataclasses.replace(each, exchange=0.0) for each in readings[:1]], 0.5) == []


def test_a_slow_process_is_named_and_ends_the_run(
    write_recipe: Callable[..., Path],
    torchrun: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 1 of three does the work of each measurement 24 times; torchrun reports its exit code."""
    recipe = write_recipe(
        steps=2, batch_size=6, parallel="ddp", preflight="stop", preflight_share=0.4, dtype="float32"
    )
    process = torchrun(3, str(recipe), script=SLOW)
    output, _ = process.communicate()
    assert process.returncode != 0
    said = " ".join(output.split())
    assert "pre-flight check: rank 1 (" in said
    assert "of the median" in said
    assert "exitcode : 69" in said
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_one_process_says_what_it_reaches_and_its_speed_is_a_share_of_it(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", str(write_recipe(steps=2, preflight="warn", dtype="float32"))]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "pre-flight check (" in said
    assert "% of the matmul measured here, causal" in said
    record = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    (found,) = record["preflight"]["readings"]
    assert found["matmul"] > 1e8
    assert found["memory"] > 1e7
    assert record["preflight"]["slow"] == []
    steps = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert all(0 < r["matmul_causal"] <= r["matmul_full"] < 1 for r in steps)
    report = (tmp_path / "run" / "report.md").read_text()
    assert "## Pre-flight check" in report
    assert "of the matmul rate that the pre-flight check measured" in report


def test_repeated_work_is_measured_as_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    time_each = hardware._time_each
    with monkeypatch.context() as patch:
        patch.setattr(
            hardware,
            "_time_each",
            lambda action, *rest: time_each(lambda: [action() for _ in range(12)], *rest),
        )
        (loaded,), _ = measure(ALONE, "float32")
    (free,), _ = measure(ALONE, "float32")
    assert loaded.matmul < 0.6 * free.matmul
    assert loaded.memory < 0.6 * free.memory
