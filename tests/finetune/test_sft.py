"""``xverse finetune`` end to end on a tiny model: it learns, it resumes, it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from xverse.cli import main
from xverse.engine import Engine, Request, SamplingParams
from xverse.formats import load_model, load_tokenizer, read_generation_config, save_hf
from xverse.tokenizer import encode_chat
from xverse.train.plot import read_metrics

ANSWERS = {"say hello": "good morning", "say bye": "good night"}


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    save_hf(tiny_model, tiny_tokenizer, tmp_path / "base", torch.float32)
    rows = [{"instruction": ask, "input": "", "output": answer} for ask, answer in ANSWERS.items()] * 20
    (tmp_path / "sft.json").write_text(json.dumps(rows))
    values = {
        "model": str(tmp_path / "base"),
        "out": str(tmp_path / "run"),
        "datasets": [{"path": str(tmp_path / "sft.json")}],
        "sequence_length": 64,
        "valid_share": 0.1,
        "train": {
            "steps": 60,
            "batch_size": 4,
            "learning_rate": 5e-3,
            "warmup_steps": 5,
            "checkpoint_every": 10,
            "dtype": "float32",
        },
        "save_dtype": "float32",
        "generation": {"do_sample": False, "max_new_tokens": 20},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_it_learns_the_answers_and_writes_a_model(recipe: Path, tmp_path: Path, capsys) -> None:
    assert main(["finetune", str(recipe)]) == 0
    target = Path(capsys.readouterr().out.strip())
    assert target == tmp_path / "run" / "model"
    assert read_generation_config(target)["max_new_tokens"] == 20
    tokenizer = load_tokenizer(target)
    engine = Engine(load_model(target), tokenizer)
    for ask, answer in ANSWERS.items():
        prompt = encode_chat(tokenizer, [{"role": "user", "content": ask}], max_new_tokens=20)
        request = Request(prompt_ids=prompt.ids, sampling=SamplingParams.greedy(20), stop_ids=(3,))
        assert "".join(event.text for event in engine.stream(request)) == answer
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    held_out = next(record["valid"] for record in records if "valid" in record)
    assert held_out["all"] < 0.5
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl") if "loss" in record]


def test_a_killed_run_goes_on_with_the_same_losses(recipe: Path, tmp_path: Path) -> None:
    assert main(["finetune", str(recipe), f"out={tmp_path / 'whole'}"]) == 0
    command = [sys.executable, "-m", "xverse.cli", "finetune", str(recipe)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "2"}, stderr=subprocess.PIPE)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > 25):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert main(["finetune", str(recipe)]) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert main(["finetune", str(recipe)]) == 0  # a finished run is left as it is


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("datasets=[]", "datasets is empty"),
        ("datasets.0.paths=x", "did you mean 'path'"),
        ("train.step=5", "did you mean 'steps'"),
        ("sequence_length=9000", "beyond the"),
        ("valid_share=1.5", "between 0 and 1"),
        ("model=nowhere", "no model 'nowhere'"),
        ("datasets.0.path=nowhere.json", "no such file"),
    ],
)
def test_mistakes_are_one_line(recipe: Path, capsys, change: str, said: str) -> None:
    assert main(["finetune", str(recipe), change]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_another_data_set_in_the_same_folder_is_refused(recipe: Path, tmp_path: Path, capsys) -> None:
    assert main(["finetune", str(recipe), "train.steps=10"]) == 0
    (tmp_path / "other.json").write_text(json.dumps([{"instruction": "a", "input": "", "output": "b"}] * 5))
    change = f"datasets.0.path={tmp_path / 'other.json'}"
    assert main(["finetune", str(recipe), "train.steps=10", change]) == 2
    assert "was begun with" in capsys.readouterr().err
