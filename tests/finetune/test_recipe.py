"""Recipes: the settings of the flags as YAML, with overrides; what recipes/nano/sft.yaml needs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests import forkserver
from xverse.cli import main
from xverse.config import UserError, read_yaml
from xverse.engine import Engine, Request, SamplingParams
from xverse.finetune.settings import DatasetUse, Settings, read_settings, to_values
from xverse.formats import ModelDirectory, load_model, load_tokenizer
from xverse.tokenizer import encode_chat
from xverse.train.plot import read_metrics

ANSWERS = {"say hello": "good morning", "say bye": "good night"}
RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> Path:
    rows = [{"instruction": ask, "input": "", "output": answer} for ask, answer in ANSWERS.items()] * 20
    (tmp_path / "sft.json").write_text(json.dumps(rows))
    (tmp_path / "who.json").write_text(json.dumps([{"instruction": "who", "output": "{{name}}"}] * 10))
    values = {
        "model_name_or_path": str(base),
        "output_dir": str(tmp_path / "run"),
        "do_train": True,
        "finetuning_type": "full",
        "dataset": [{"name": str(tmp_path / "sft.json"), "repeat": 2}, str(tmp_path / "who.json")],
        "identity": {"name": "good"},
        "cutoff_len": 64,
        "packing": True,
        "val_size": 0.2,
        "max_steps": 60,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": 5,
        "logging_steps": 1,
        "save_steps": 10,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 30,
        "save_dtype": "bfloat16",
        "generation": {"do_sample": False, "max_new_tokens": 20},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_it_learns_the_replies_and_writes_a_model(recipe: Path, tmp_path: Path, capsys) -> None:
    assert main(["finetune", str(recipe)]) == 0
    target = Path(capsys.readouterr().out.strip())
    assert target == tmp_path / "run"
    assert ModelDirectory.of(target).generation_config["max_new_tokens"] == 20
    model, tokenizer = load_model(target), load_tokenizer(target)
    assert model.lm_head.weight.dtype == torch.bfloat16
    engine = Engine(model, tokenizer)
    for ask, answer in ANSWERS.items():
        prompt = encode_chat(tokenizer, [{"role": "user", "content": ask}], max_new_tokens=20)
        greedy = SamplingParams(temperature=0.0, max_new_tokens=20)
        request = Request(prompt_ids=prompt.ids, sampling=greedy)
        assert "".join(event.text for event in engine.stream(request)) == answer
    records = read_metrics(target / "metrics.jsonl")
    valid = [record["valid"] for record in records if "valid" in record][-1]
    assert set(valid) == {"all", str(tmp_path / "sft.json"), str(tmp_path / "who.json")}
    assert all(loss < 0.5 for loss in valid.values())
    rates = [record["learning_rate"] for record in records if "learning_rate" in record]
    assert rates[-1] == pytest.approx(5e-4, rel=0.1), "the floor of the schedule"
    assert len(list(target.glob("checkpoint-*"))) == 2


def test_a_stopped_run_saves_a_checkpoint(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "xverse.cli", "finetune", str(recipe), "max_steps=5000"]
    process = forkserver.Popen(command, env=os.environ, stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 400
    while not (log.exists() and len(log.read_text().splitlines()) > 12):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == 130, error
    assert "run the same command to continue" in " ".join(error.split())
    saved = [int(path.name.partition("-")[2]) for path in (tmp_path / "run").glob("checkpoint-*")]
    steps = [record["step"] + 1 for record in read_metrics(log) if "loss" in record]
    assert max(saved) == steps[-1]


def test_overrides_reach_every_recipe(recipe: Path, capsys) -> None:
    words = ["finetune", str(recipe), "model_name_or_path=nowhere", "--lora_rank", "4"]
    assert main([*words, "dataset.0.repeat=3"]) == 2
    assert "no model 'nowhere'" in capsys.readouterr().err
    for name in ("sft/full.yaml", "sft/lora.yaml", "dpo/lora.yaml", "nano/sft.yaml"):
        words = ["finetune", str(RECIPES / name), "model_name_or_path=nowhere", "max_steps=3"]
        assert main([*words, "--learning_rate", "1e-3", "deepspeed=null"]) == 2
        assert "no model 'nowhere'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["dataset.0.repeats=2", "max_step=5"], r"dataset.0.repeats.*'repeat'.*max_step.*'max_steps'"),
        (["dataset.0.repeat=0"], "repeat must be at least 1"),
        (["train.steps=5"], "train.steps → max_steps"),
        (["out=x", "sequence_length=64"], "out → output_dir, sequence_length → cutoff_len"),
        (["cutoff_len=4"], "cutoff_len 4 is out of range"),
        (["val_size=1.5"], "neither a share"),
        (["generation.temprature=1"], "temprature"),
        (["finetuning_type=lora"], "save_dtype needs finetuning_type full or freeze"),
        (["identity={}"], "unfilled placeholders {{name}}"),
    ],
)
def test_mistakes_are_one_line(recipe: Path, capsys, changes: list[str], message: str) -> None:
    assert main(["finetune", str(recipe), *changes]) == 2
    error = capsys.readouterr().err
    assert re.search(message, " ".join(error.split()))
    assert "Traceback" not in error


def test_a_former_recipe_is_refused_with_what_to_change() -> None:
    former = {"model": "nano", "out": "o", "datasets": [{"path": "x"}], "train": {"steps": 5, "muon": 1}}
    message = r"model → model_name_or_path, out → .*, train.steps → max_steps, train.muon → remove it; add"
    with pytest.raises(UserError, match=message):
        read_settings(former, "old.yaml")


def test_settings_survive_being_written_and_read(recipe: Path) -> None:
    settings = read_settings(read_yaml(recipe), "test")
    assert settings.dataset[0] == DatasetUse(name=settings.dataset[0].name, repeat=2)
    assert read_settings(json.loads(json.dumps(to_values(settings))), "test") == settings
    plain: dict[str, Any] = {"model_name_or_path": "m", "output_dir": "o", "dataset": "a, b", "do_eval": True}
    assert to_values(read_settings(plain, "test"))["dataset"] == "a,b"


def test_the_nano_recipe_is_what_its_model_was_trained_with() -> None:
    settings: Settings = read_settings(read_yaml(RECIPES / "nano" / "sft.yaml"), "nano")
    assert (settings.cutoff_len, settings.max_steps, settings.per_device_train_batch_size) == (256, 2500, 8)
    assert settings.dataset[2].max_reply_tokens == 64
    assert settings.dataset[1].repeat == 3
    assert settings.packs
