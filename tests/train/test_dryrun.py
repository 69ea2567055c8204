"""Dry runs: a cluster's recipe checked without the cluster; the recipes for 7B and their Slurm script."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from xverse.cli import main
from xverse.config import UserError, load
from xverse.plan.devices import DEVICES
from xverse.plan.layout import Architecture
from xverse.plan.memory import memory
from xverse.plan.search import task_of
from xverse.train import PretrainRecipe, TrainConfig
from xverse.train.dryrun import dry_run
from xverse.train.pretrain import checked_shape
from xverse.train.settings import layout_of

ROOT = Path(__file__).resolve().parents[2]
RECIPES = [ROOT / "recipes" / "7b" / f"{name}.yaml" for name in ("a800-1024", "h100-512", "continue-8")]
Recipe = Callable[..., Path]


def recipe_of(path: Path) -> PretrainRecipe:
    needs = set(yaml.safe_load(path.read_text(encoding="utf-8"))["train"])
    if needs - {field.name for field in dataclasses.fields(TrainConfig)} == {"context"}:
        pytest.skip("this trainer has no context parallelism")
    return load(PretrainRecipe, path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_for_7b_fit_their_clusters(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the mixture's file is named from there
    recipe = recipe_of(path)
    assert recipe.cluster is not None
    mixture = recipe.mixture.read()
    shape, _ = checked_shape(recipe)
    device = DEVICES[recipe.cluster.device]
    layout = layout_of(recipe.train, recipe.cluster.gpus, shape, recipe.sequence_length, 8)
    assert memory(Architecture.of(shape), layout, recipe.sequence_length).total < device.memory
    if recipe.cluster.gpus > 8:
        tokens = recipe.train.steps * recipe.train.batch_size * recipe.sequence_length
        assert tokens == pytest.approx(2.6e12, rel=1e-4)
        assert mixture.categories is not None
        assert mixture.languages is not None
        assert len(mixture.languages) == 41
        assert sum(mixture.categories.values()) == pytest.approx(100, abs=0.1)
        assert sum(mixture.languages.values()) == pytest.approx(100, abs=0.1)
    else:
        assert mixture.weights is not None


def test_a_dry_run_of_7b() -> None:
    found = dry_run(recipe_of(ROOT / "recipes" / "7b" / "continue-8.yaml"))
    said = str(found)
    assert found.seconds < 120
    assert "7,299,846,144 parameters" in said
    assert "8 processes; rank 0 holds 912,482,816" in said
    assert "1 × 8,192 tokens ran forward and backward" in said
    assert "is not on this machine; only the names and weights of the mixture's 3 sources" in said
    counted = float(re.search(r"([0-9.]+) GB kept", said)[1])  # type: ignore[index]
    assert counted == pytest.approx(float(re.search(r"activations ([0-9.]+)", said)[1]), rel=0.15)  # type: ignore[index]


def test_a_world_of_1024_on_data_that_is_here(
    write_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(
        {"cluster": {"device": "a800", "gpus": 1024}}, steps=2, batch_size=2048, micro_batch_size=1,
        parallel="fsdp",
    )  # fmt: skip
    assert main(["pretrain", str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "1,024 processes; rank 0 holds" in said
    assert "mixture of 2 sources" in said
    assert "1 × 48 tokens ran forward and backward" in said
    assert "predicted for: FSDP 1024, micro-batch 1 × 2" in said
    assert not (path.parent / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["cluster.gpus=3"],
            "batch_size 8 does not divide into 3 processes of micro-batches of 1; the nearest",
        ),
        (["cluster=null"], "add cluster: {device: a800, gpus: 1024} to the recipe"),
        (["cluster.device=a80"], "unknown device 'a80'"),
        (["train.parallel=none"], "parallel: none, but there are 4 processes"),
        (["sequence_length=9000"], "sequence_length 9000 exceeds the 8192 positions"),
        (["data=nowhere", "mixture.weights={'a b': 1}"], "'a b' does not name a source"),
        (["data=nowhere", "mixture.file=nowhere.yaml"], "nowhere.yaml: no such file"),
        (["data=nowhere", "mixture={categories: {web: 0.5}}"], "0.5"),
        (["data=nowhere", "mixture.weights={en: -1}"], "the weight of 'en' is -1"),
    ],
)
def test_what_would_stop_the_run_is_found(write_recipe: Recipe, overrides: list[str], said: str) -> None:
    path = write_recipe(
        {"cluster": {"device": "a800", "gpus": 4}}, steps=2, batch_size=8, micro_batch_size=1, parallel="fsdp"
    )
    with pytest.raises(UserError) as caught:
        dry_run(load(PretrainRecipe, path, overrides))
    assert said in str(caught.value)


def test_what_does_not_fit_into_memory_is_found(write_recipe: Recipe) -> None:
    path = write_recipe(
        {"shape": "7b", "sequence_length": 8192, "data": "nowhere", "cluster": {"device": "a800", "gpus": 8}},
        steps=2, batch_size=32, micro_batch_size=4, parallel="fsdp",
    )  # fmt: skip
    with pytest.raises(UserError, match="but A800 80 GB has 80 GB; find a layout that fits with xverse plan"):
        dry_run(load(PretrainRecipe, path))


def test_plans_and_recipes_mean_the_same_layout() -> None:
    from xverse.model.config import named_shape
    from xverse.plan.report import settings
    from xverse.plan.search import search

    known = {field.name for field in dataclasses.fields(TrainConfig)}
    task = task_of(named_shape("7b"), "7b", DEVICES["h200"], 64, None, None)
    checked = 0
    for prediction in search(task)[:200]:
        keys = settings(prediction)
        if set(keys) <= known:
            config = TrainConfig(steps=1, learning_rate=1e-4, **keys)
            assert layout_of(config, 64, task.shape, task.length) == prediction.layout
            checked += 1
    assert checked


# The Slurm script: real bash, commands of the cluster in its place.
STUBS = {
    "scontrol": 'if [[ $1 == show ]]; then echo node1; else echo "$@" >> "$LOG"; fi',
    "scancel": 'echo scancel "$@" >> "$LOG"; mkdir -p run/checkpoints/step-00000002',
    "srun": 'echo srun "$@" >> "$LOG"; eval "$BEHAVIOUR"',
}


def slurm(tmp_path: Path, behaviour: str, recipe: str = "out: run\n") -> tuple[int, str, str]:
    """Exit code, what it asked of Slurm, what it printed; ``behaviour`` is bash in the place of the run."""
    for name, text in STUBS.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/usr/bin/env bash\n{text}\n")
        file.chmod(0o755)
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "log").touch()
    environment = {
        **os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"),
        "BEHAVIOUR": behaviour, "SLURM_JOB_ID": "7", "SLURM_NNODES": "128",
        "SLURM_JOB_NODELIST": "node[1-128]",
    }  # fmt: skip
    script = ROOT / "recipes" / "7b" / "run.sbatch"
    result = subprocess.run(
        ["bash", str(script), "recipe.yaml", "train.log_every=5"], cwd=tmp_path, env=environment,
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    return result.returncode, (tmp_path / "log").read_text(), result.stdout + result.stderr


HEART = """mkdir -p run/heartbeats; echo '{"status": "%s"}' > run/heartbeats/0.json; """


@pytest.mark.parametrize(
    ("behaviour", "code", "requeued"),
    [
        ("exit 0", 0, False),
        (HEART % "hung" + "exit 1", 0, True),
        (HEART % "stopped" + "exit 1", 130, False),
        (HEART % "failed" + "mkdir -p run/checkpoints/step-00000001; exit 1", 0, True),
        (HEART % "failed" + "exit 1", 1, False),  # a mistake in the recipe: again would not help
        # The time limit: a checkpoint is asked for and waited for, then the queue.
        ("kill -USR2 $PPID; sleep 2", 0, True),
    ],
)
def test_slurm_starts_again_what_can_go_on(tmp_path: Path, behaviour: str, code: int, requeued: bool) -> None:
    found, log, printed = slurm(tmp_path, behaviour)
    assert found == code, printed
    assert ("requeue 7" in log) == requeued, printed
    assert "--nnodes=128 --nproc-per-node=8" in log
    assert "--rdzv-endpoint=node1:29400 -m xverse.cli pretrain recipe.yaml train.log_every=5" in log
    assert ("scancel --signal=USR1 7" in log) == ("USR2" in behaviour)


def test_slurm_needs_to_know_the_run(tmp_path: Path) -> None:
    code, log, printed = slurm(tmp_path, "exit 0", recipe="shape: 7b\n")
    assert code != 0
    assert "has no out" in printed
    assert log == ""
