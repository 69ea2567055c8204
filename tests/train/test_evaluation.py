"""Benchmarks while a model is trained, from the recipe's key to the record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xverse.cli import main


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    """A benchmark of the user's own, small enough for the smallest model."""
    folder = tmp_path / "quiz"
    folder.mkdir()
    rows = [{"question": f"{n}?", "options": ["a", "b"], "answer": n % 2} for n in range(8)]
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    path = tmp_path / "quiz.yaml"
    path.write_text('name: quiz\nfiles: {test: "*.jsonl"}\nsplit: test\nheader: ""\n', encoding="utf-8")
    return path


def test_it_is_recorded_and_changes_no_loss(
    write_recipe: Callable[..., Path], quiz: Path, tmp_path: Path, capsys: Any
) -> None:
    def losses(out: Path, records: list[dict[str, Any]]) -> list[float]:
        return [record["loss"] for record in records if "loss" in record]

    def train(out: Path, *more: str) -> list[dict[str, Any]]:
        recipe = write_recipe(steps=4, validate_every=2)
        assert main(["pretrain", str(recipe), f"out={out}", *more]) == 0
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    asked = [f"evaluation.tasks=[{quiz}]", f"evaluation.data_dir={quiz.parent}", "evaluation.shots=1"]
    with_it = train(tmp_path / "with", *asked)
    without = train(tmp_path / "without")
    found = [record["evaluation"] for record in with_it if "evaluation" in record]
    assert len(found) == 2
    assert all(0 <= each["quiz"] <= 1 for each in found)
    assert losses(tmp_path, with_it) == losses(tmp_path, without)


def test_a_missing_benchmark_ends_a_run_before_it_begins(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    recipe = write_recipe(steps=2)
    asked = ["evaluation.tasks=[mmlu]", f"evaluation.data_dir={tmp_path}"]
    assert main(["pretrain", str(recipe), f"out={tmp_path / 'out'}", *asked]) == 2
    assert "xverse eval fetch mmlu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["pretrain", str(recipe), *asked, "evaluation.limit=0"]) == 2
    assert "limit must be positive" in capsys.readouterr().err
