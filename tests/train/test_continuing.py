"""Runs are prolonged, shortened and branched from a checkpoint before their schedule differs; checkpoints and
runs are models for every command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from xverse.cli import main
from xverse.config import UserError, load
from xverse.formats import ModelDirectory, load_model
from xverse.train import PretrainRecipe, TrainConfig, pretrain
from xverse.train.checkpoint import kept
from xverse.train.continuing import same_rates
from xverse.train.plot import read_metrics

WSD = {"schedule": "wsd", "decay_share": 0.25, "warmup_steps": 2, "checkpoint_every": 5, "dtype": "float32"}


Write = Callable[..., Path]


def run(write_recipe: Write, out: Path, top: dict[str, Any] | None = None, **train: Any) -> Path:
    recipe = write_recipe({"out": str(out), **(top or {})}, **{**WSD, **train})
    return pretrain(load(PretrainRecipe, recipe))


def losses(out: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(out / "metrics.jsonl") if "loss" in r}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_finished_run_is_prolonged_and_branched_exactly(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """12 steps with a decay from 9, then 20 steps in the same folder: as a run of 20 from the start."""
    expected = run(write_recipe, tmp_path / "whole", steps=20)
    short = run(write_recipe, tmp_path / "run", steps=12)
    names = [path.name for path in kept(tmp_path / "run").all()]
    assert names == ["step-00000009", "step-00000010", "step-00000012"], "before the decay, and the last two"
    decayed = {name: tensor.clone() for name, tensor in weights(short).items()}
    source = tmp_path / "run" / "checkpoints" / "step-00000009"
    branch = run(write_recipe, tmp_path / "branch", {"resume_from": str(source)}, steps=20)
    assert same(branch, expected)
    assert losses(tmp_path / "branch") == {s: x for s, x in losses(tmp_path / "whole").items() if s >= 9}
    other = run(
        write_recipe, tmp_path / "other", {"resume_from": str(tmp_path / "run")}, steps=12, decay_share=0.1
    )
    assert min(losses(tmp_path / "other")) == 9, "another decay begins where both are alike"
    assert not same(other, short)
    longer = run(write_recipe, tmp_path / "run", steps=20)
    assert "step-00000012 followed another schedule; it is kept as superseded-step-00000012" in " ".join(
        capsys.readouterr().err.split()
    )
    assert same(longer, expected)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    aside = weights(tmp_path / "run" / "checkpoints" / "superseded-step-00000012")
    assert all(torch.equal(aside[name], decayed[name]) for name in aside)


def test_what_cannot_be_prolonged_is_refused(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    run(write_recipe, tmp_path / "cosine", schedule="cosine", steps=6)
    with pytest.raises(UserError, match=r"begun with steps = 6, not 9; its 6 .*only schedule wsd can be"):
        run(write_recipe, tmp_path / "cosine", schedule="cosine", steps=9)
    run(write_recipe, tmp_path / "wsd", steps=8)
    for path in kept(tmp_path / "wsd").all()[:-1]:
        shutil.rmtree(path)
    with pytest.raises(UserError, match="no checkpoint from before the decay is left"):
        run(write_recipe, tmp_path / "wsd", steps=9)
    for top, message in (
        ({"seed": 1}, "begun with seed = 0, not 1"),
        ({"resume_from": str(tmp_path / "none")}, "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            run(write_recipe, tmp_path / "new", {"resume_from": str(tmp_path / "wsd"), **top}, steps=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"resume_from: .* has no checkpoints"):
        run(write_recipe, tmp_path / "new", {"resume_from": str(tmp_path / "empty")}, steps=8)


def test_only_schedules_with_the_same_rates_so_far_continue() -> None:
    begun = {"steps": 100, "schedule": "wsd", "decay_share": 0.2, "learning_rate": 1.0, "warmup_steps": 10}

    def config(**values: Any) -> TrainConfig:
        return TrainConfig(**{"batch_size": 1, **begun, **values})

    for values, step, expected in (
        ({"steps": 200}, 80, True),
        ({"steps": 200}, 81, False),
        ({"steps": 90}, 72, True),
        ({"steps": 90}, 73, False),
        ({"steps": 60, "decay_share": 0.01}, 70, False),
        ({"decay_share": 0.1}, 80, True),
        ({"final_lr_ratio": 0.0}, 80, True),
        ({"learning_rate": 2.0}, 1, False),
        ({"warmup_steps": 20}, 1, False),
        ({"schedule": "cosine"}, 10, True),
        ({"schedule": "cosine"}, 12, False),
        ({"learning_rate": 2.0}, 0, True),
    ):
        assert same_rates(begun, config(**values), step) is expected, (values, step)


def test_runs_and_checkpoints_are_models(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = run(write_recipe, tmp_path / "run", steps=6, checkpoint_every=2)
    out = tmp_path / "run"
    last = out / "checkpoints" / "step-00000006"
    assert ModelDirectory.of(out).path == model, "a finished run is its model"
    assert same(last, model)
    earlier = out / "checkpoints" / "step-00000004"
    shutil.rmtree(model)
    with (last / next(last.glob("*.safetensors")).name).open("r+b") as file:
        file.seek(-1, 2)
        byte = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([byte[0] ^ 1]))
    capsys.readouterr()
    assert ModelDirectory.of(out).path == earlier, "cut short: the newest that is intact"
    said = " ".join(capsys.readouterr().err.split())
    assert "has another SHA-256 than was recorded" in said
    assert "using checkpoints/step-00000004" in said
    for name in (out, earlier):
        for verb in (
            ["export", "--format", "hf"],
            ["export", "--format", "gguf"],
            ["quantize", "--bits", "8", "--method", "rtn-row"],
        ):
            target = tmp_path / f"{name.name}-{'-'.join(verb)}.{verb[-1]}"
            assert main([verb[0], "--model", str(name), "--out", str(target), *verb[1:]]) == 0
            assert target.exists()
        assert same(tmp_path / f"{name.name}-export---format-hf.hf", earlier)
    half = tmp_path / "half"
    assert main(["export", "--model", str(out), "--type", "bf16", "--format", "hf", "--out", str(half)]) == 0
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights(half).values())
    assert main(["chat", "--model", str(out), "--ask", "a", "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    assert main(["export", "--model", str(last), "--format", "hf", "--out", str(tmp_path / "no")]) == 2
    assert "this checkpoint cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    more = run(write_recipe, tmp_path / "more", {"model": str(earlier)}, steps=1)
    assert losses(more.parent)[0] == pytest.approx(losses(out)[4], rel=0.5)
    expected = weights(earlier)
    read = {f"model.{name}": torch.empty_like(tensor) for name, tensor in expected.items()}
    dcp.load(read, storage_reader=dcp.HuggingFaceStorageReader(str(earlier)), no_dist=True)
    assert all(torch.equal(read[f"model.{name}"], tensor) for name, tensor in expected.items())
    state = json.loads((earlier / "state.json").read_text())
    assert {"config.json", "tokenizer.json"} <= state["files"].keys()
    with pytest.raises(UserError, match="write a model directory first: xverse export --model"):
        _ = ModelDirectory.of(earlier).plain_path
