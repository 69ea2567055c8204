"""What transformers does only on machines with several GPUs, simulated: it would use nn.DataParallel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from xverse.cli import main
from xverse.finetune import launch
from xverse.train.plot import read_metrics


class TwoGPUs(TrainingArguments):
    """The arguments as they are on a machine with two GPUs, without a launcher."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._n_gpu = 2


def test_without_a_launcher_one_gpu_trains_and_the_others_are_named(
    document: dict[str, str], flags: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "TrainingArguments", TwoGPUs)
    assert main(["finetune", *flags(document | {"num_train_epochs": "1"})]) == 0
    assert "1 of 2 GPUs; to use all: torchrun --nproc-per-node 2" in capsys.readouterr().err
    assert any("loss" in record for record in read_metrics(tmp_path / "out" / "metrics.jsonl"))
