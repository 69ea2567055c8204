"""The studies of fine-tuning: all contenders compute the same loss, and mistakes are reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from benchmarks.__main__ import main
from benchmarks.studies import finetune, trainers
from xverse.finetune.encode import Example
from xverse.model import XverseConfig

SHAPE = XverseConfig(
    vocab_size=12_288, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)


@pytest.fixture(scope="module")
def job(tmp_path_factory: Any) -> dict[str, Any]:
    """Four examples that make one step, or one packed row."""
    folder = tmp_path_factory.mktemp("bench")
    rows = [{"instruction": f"say {i}", "input": "", "output": "good morning " * (i + 1)} for i in range(4)]
    (folder / "rows.json").write_text(json.dumps(rows))
    figures = finetune._prepare(folder, SHAPE, folder / "rows.json", 128)
    return {**figures, "length": 128, "batch_size": 4, "steps": 1, "threads": 1}


def first_loss(job: dict[str, Any], side: str) -> float:
    rows = [Example(*each) for each in json.loads(Path(job["examples"]).read_text())]
    trainer = trainers._trainer({**job, "side": side}, rows, TrainerCallback())
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def test_contenders_have_one_loss(job) -> None:
    pytest.importorskip("datasets")
    expected = first_loss(job, "xverse")
    for side in ("xverse-packed", "transformers"):
        assert first_loss(job, side) == pytest.approx(expected, abs=5e-3), side


def test_trl_packs_the_same_examples(job) -> None:
    pytest.importorskip("trl")
    assert first_loss(job, "trl-bfd") == pytest.approx(first_loss(job, "xverse-packed"), abs=5e-3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["finetune"], "name a file of instructions with --data"),
        (["finetune-quality", "--data", "x", "--out", "."], "is not empty"),
        (["finetune", "--data", "x", "--contenders", "xvers"], "did you mean 'xverse'"),
        (["finetune", "--part", "memory", "--shape", "8b"], "8b"),
    ],
)
def test_mistakes_are_one_line(arguments, expected, capsys) -> None:
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err
