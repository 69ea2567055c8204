"""Shards, checkpoints and models at URLs: a run continues on another machine, whatever is killed or fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests import forkserver
from tests.object_store import ObjectStore, object_store
from xverse import remote
from xverse.cli import main
from xverse.config import UserError, load
from xverse.formats import ModelDirectory, load_model
from xverse.place import MARKS, Place
from xverse.train import PretrainRecipe, pretrain

DATA, RUN = "s3://bucket/data", "s3://bucket/run"
STEPS = {"steps": 6, "checkpoint_every": 2, "keep_checkpoints": 2, "dtype": "float32"}


@pytest.fixture(scope="module")
def store(prepared: Path) -> Iterator[ObjectStore]:
    with object_store() as running:
        Place(prepared, DATA).send()
        yield running


@pytest.fixture(autouse=True)
def machine(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``machine("b")`` goes on on another machine, which has another cache."""
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    store.reset()
    if store.names("run"):
        store.files.rm("bucket/run", recursive=True)

    def change(name: str) -> None:
        monkeypatch.setenv("XVERSE_CACHE", str(tmp_path / name))

    change("a")
    return change


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Path:
    return write_recipe({"data": DATA, "out": RUN}, **STEPS)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def expected(
    prepared: Path, tiny_shape: dict[str, int], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """The weights of the run on local files, without an interruption."""
    folder = tmp_path_factory.mktemp("local")
    values: dict[str, Any] = {
        "shape": tiny_shape, "data": str(prepared), "out": str(folder / "run"), "sequence_length": 48,
        "train": {"batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 5, "preflight": "off", **STEPS},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return weights(pretrain(load(PretrainRecipe, folder / "recipe.yaml")))


def test_killed_while_it_sends(
    store: ObjectStore, machine: Any, recipe: Path, expected: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a killed machine was sending is not taken for a checkpoint; another one goes on from the one
    before, to the weights of a run that nothing interrupted."""
    store.release.clear()
    store.held.clear()
    store.holds = lambda method, path: method == "PUT" and "step-00000004/config.json" in path
    command = [sys.executable, "-m", "xverse.cli", "pretrain", str(recipe)]
    with forkserver.Popen(command) as process:
        assert store.held.wait(120)
        process.kill()
    store.reset()
    assert any(name.startswith("checkpoints/step-00000004/") for name in store.names("run"))
    assert "checkpoints/step-00000004/state.json" not in store.names("run")
    assert "checkpoints/step-00000002/state.json" in store.names("run")

    machine("b")
    assert main(["pretrain", str(recipe)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{RUN}/model\n"
    assert "resuming from" in said.err
    assert "step-00000002" in said.err
    checkpoints = {name.split("/")[1] for name in store.names("run") if name.startswith("checkpoints/")}
    assert checkpoints == {"step-00000004", "step-00000006"}
    assert {f"model/{MARKS}", "model/config.json", "recipe.json", "metrics.jsonl"} <= store.names("run")

    machine("c")  # every way to name the model at the URL
    for name in (f"{RUN}/model", RUN, f"{RUN}/checkpoints/step-00000006"):
        model = load_model(ModelDirectory.named(name)).state_dict()
        assert all(torch.equal(model[key], expected[key]) for key in expected), name
    copied = capsys.readouterr().err
    load_model(ModelDirectory.named(RUN))
    assert "copied to" in copied
    assert "copied to" not in capsys.readouterr().err

    store.files.rm("bucket/run/model", recursive=True)
    (newest,) = (name for name in store.names("run") if "step-00000006/shard" in name)
    store.files.pipe(f"bucket/run/{newest}", b"damaged")
    machine("d")
    assert main(["pretrain", str(recipe)]) == 0
    said = capsys.readouterr()
    assert "another size or SHA-256" in said.err
    assert "resuming from" in said.err
    machine("e")
    assert all(torch.equal(weights(ModelDirectory.named(RUN).path)[key], expected[key]) for key in expected)


def test_a_store_that_fails(
    store: ObjectStore, recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.failures = 3
    assert main(["pretrain", str(recipe), "train.steps=2"]) == 0
    assert store.answered == 3
    assert "checkpoints/step-00000002/state.json" in store.names("run")
    capsys.readouterr()

    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    monkeypatch.setattr(type(store.files), "retries", 1)
    store.failures, store.matches = 10**6, lambda method, path: method == "PUT" and "checkpoints" in path
    assert main(["pretrain", str(recipe), "train.steps=4", "train.schedule=wsd", f"out={RUN}2"]) == 2
    said = capsys.readouterr().err
    assert "WARNING: step-00000002 was not sent" in said
    assert "run the same command again to send it" in said
    store.reset()
    assert main(["pretrain", str(recipe), "train.steps=4", "train.schedule=wsd", f"out={RUN}2"]) == 0
    assert "checkpoints/step-00000004/state.json" in store.names("run2")
    assert f"{RUN}2: this run is finished" in capsys.readouterr().err


def test_shards_at_a_url(store: ObjectStore, recipe: Path, machine: Any, monkeypatch: Any) -> None:
    """They are copied once; one that differs from the list is refused."""
    assert main(["data", "show", DATA]) == 0
    store.matches, store.failures = lambda method, path: method == "GET" and path.endswith(".bin"), 10**6
    assert main(["data", "show", DATA]) == 0
    assert store.answered == 0
    store.reset()
    machine("b")
    whole = store.files.cat("bucket/data/train/en/tokens.bin")
    store.files.pipe("bucket/data/train/en/tokens.bin", whole[:-4] + b"\1\1\1\1")
    with pytest.raises(UserError, match=r"en/tokens\.bin: has another size or SHA-256 than was recorded"):
        pretrain(load(PretrainRecipe, recipe))
    store.files.pipe("bucket/data/train/en/tokens.bin", whole)
    report = store.files.cat("bucket/data/report.json")
    store.files.rm("bucket/data/report.json")
    with pytest.raises(UserError, match=r"data/report\.json: no such file; upload the folder again"):
        pretrain(load(PretrainRecipe, recipe))
    listed = store.files.cat(f"bucket/data/{MARKS}")
    store.files.rm(f"bucket/data/{MARKS}")  # as if another program had uploaded half of it
    with pytest.raises(UserError, match=r"has no report\.json"):
        pretrain(load(PretrainRecipe, recipe))
    store.files.pipe(f"bucket/data/{MARKS}", listed)
    store.files.pipe("bucket/data/report.json", report)


def test_two_processes(
    store: ObjectStore, recipe: Path, machine: Any, torchrun: Any, expected: Any, capsys: Any
) -> None:
    """Both read the shards and share the run's folder; process 0 sends it."""
    run = torchrun(2, str(recipe), "train.parallel=ddp", "train.steps=4")
    said = run.communicate()[0]
    assert run.returncode == 0, said
    assert json.loads(store.files.cat("bucket/run/checkpoints/step-00000004/state.json"))["processes"] == 2
    assert ModelDirectory.named(RUN).config.hidden_size == 32
