"""Processes under torchrun compute what one does, survive kills, and change their number."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from xverse.cli import main
from xverse.config import load
from xverse.train import PretrainRecipe, pretrain
from xverse.train.checkpoint import kept
from xverse.train.plot import read_metrics

Recipe = Callable[..., Path]
Torchrun = Callable[..., Any]


def finished(process: Any) -> str:
    """What it printed, when it has ended well."""
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    return output


def losses(out: Path) -> dict[int, tuple[float, float, float]]:
    records = [record for record in read_metrics(out / "metrics.jsonl") if "loss" in record]
    return {record["step"]: (record["loss"], record["grad_norm"], record["lr"]) for record in records}


def close(some: dict[int, tuple[float, float, float]], others: dict[int, tuple[float, float, float]]) -> bool:
    return some.keys() == others.keys() and all(
        values[0] == pytest.approx(others[step][0], rel=1e-5)
        and values[1] == pytest.approx(others[step][1], rel=1e-3)
        for step, values in some.items()
    )


@pytest.fixture
def one(write_recipe: Recipe, tmp_path: Path) -> tuple[Path, Path]:
    """A recipe of 20 steps in float32, and the folder in which one process has run it."""
    recipe = write_recipe(
        {"valid_tokens": 200},
        steps=20,
        batch_size=8,
        dtype="float32",
        checkpoint_every=6,
        keep_checkpoints=9,
        validate_every=7,
    )
    out = tmp_path / "one"
    pretrain(load(PretrainRecipe, recipe, [f"out={out}"]))
    return recipe, out


def test_a_run_of_two_processes_goes_on_in_one(
    one: tuple[Path, Path], torchrun: Torchrun, tmp_path: Path
) -> None:
    """(What other layouts compute is in test_layouts.py.)"""
    recipe, out = one
    there = tmp_path / "there"
    said = finished(
        torchrun(2, str(recipe), f"out={there}", "train.parallel=fsdp", "train.micro_batch_size=2")
    )
    assert close(losses(there), losses(out)), said
    expected = load_file(out / "model" / "model.safetensors")
    for name, tensor in load_file(there / "model" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=0)
    validations = [
        [r["valid"] for r in read_metrics(o / "metrics.jsonl") if "valid" in r] for o in (there, out)
    ]
    for found, wanted in zip(*validations, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    sizes = [file.stat().st_size for file in kept(there).all()[-1].glob("*.safetensors")]
    assert len(sizes) == 2, "each process writes its own"
    assert max(sizes) < 2 * min(sizes)
    for path in kept(there).all():  # as if it had been killed after step 12
        if int(path.name[5:]) > 12:
            shutil.rmtree(path)
    (there / "metrics.jsonl").rename(there / "before.jsonl")
    assert main(["pretrain", str(recipe), f"out={there}"]) == 0
    assert close(losses(there), {step: values for step, values in losses(out).items() if step >= 12})


def test_signals_reach_one_process_and_all_save(
    write_recipe: Recipe, torchrun: Torchrun, tmp_path: Path
) -> None:
    recipe = write_recipe(steps=3000, checkpoint_every=0, parallel="ddp")
    out = tmp_path / "run"
    process = torchrun(2, str(recipe))
    while not (out / "metrics.jsonl").exists() or len(losses(out)) < 5:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    pid = json.loads((out / "heartbeats" / "1.json").read_text())["pid"]
    os.kill(pid, signal.SIGUSR1)
    while not kept(out).all():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "run the same command to continue from it" in output
    assert len(kept(out).all()) == 2, "SIGUSR1 saves and goes on, SIGTERM saves and stops"
    assert json.loads((out / "heartbeats" / "0.json").read_text())["status"] == "stopped"


def test_mistakes_with_processes_are_one_line(
    write_recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(steps=2)
    for arguments, said in (
        (["train.parallel=ddp"], "parallel: ddp needs torchrun"),
        (["train.tensor=2"], "tensor 2 needs parallel: fsdp, not none"),
        (["train.batch_size=0"], "batch_size must be positive, not 0"),
    ):
        assert main(["pretrain", str(recipe), *arguments]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun has it
    assert main(["pretrain", str(recipe)]) == 2
    said = "parallel: none, but there are 2 processes; set train.parallel to ddp or fsdp"
    assert said in " ".join(capsys.readouterr().err.split())
