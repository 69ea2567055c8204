"""A tiny model and a folder of datasets, as somebody's own would be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xverse.formats import save_hf


@pytest.fixture
def base(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    save_hf(tiny_model, tiny_tokenizer, tmp_path / "base", torch.float32)
    return tmp_path / "base"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``alpaca_gpt4_en`` and ``other``, 40 examples each of unequal lengths."""
    path = tmp_path / "data"
    path.mkdir()
    rows = [
        {"instruction": f"say hello {i}", "input": "", "output": "good morning " + "and again " * (i % 5)}
        for i in range(40)
    ]
    (path / "small.json").write_text(json.dumps(rows))
    turns = [
        {"conversations": [{"from": "human", "value": f"count to {i}"}, {"from": "gpt", "value": "one " * i}]}
        for i in range(1, 41)
    ]
    (path / "turns.json").write_text(json.dumps(turns))
    info = {
        "alpaca_gpt4_en": {"file_name": "small.json"},
        "other": {"file_name": "turns.json", "formatting": "sharegpt"},
    }
    (path / "dataset_info.json").write_text(json.dumps(info))
    return path


@pytest.fixture
def document(base: Path, folder: Path, tmp_path: Path) -> dict[str, str]:
    """The command of XVERSE-7B's README, but for model, data and how often something is done."""
    return {
        "stage": "sft",
        "model_name_or_path": str(base),
        "do_train": "",
        "dataset": "alpaca_gpt4_en",
        "dataset_dir": str(folder),
        "template": "default",
        "finetuning_type": "full",
        "output_dir": str(tmp_path / "out"),
        "overwrite_cache": "",
        "per_device_train_batch_size": "4",
        "per_device_eval_batch_size": "4",
        "gradient_accumulation_steps": "2",
        "preprocessing_num_workers": "16",
        "lr_scheduler_type": "cosine",
        "logging_steps": "1",
        "save_steps": "4",
        "eval_steps": "4",
        "learning_rate": "2e-5",
        "max_grad_norm": "0.5",
        "num_train_epochs": "2.0",
        "evaluation_strategy": "steps",
        "load_best_model_at_end": "",
        "plot_loss": "",
        "bf16": "",
        "padding_side": "right",
    }


@pytest.fixture
def flags() -> Callable[[dict[str, str]], list[str]]:
    """``--name value`` of a mapping; an empty value is a bare flag."""
    return lambda values: [word for name, value in values.items() for word in (f"--{name}", value) if word]
