"""Killed, interrupted, damaged: a run goes on as if nothing had been, or says clearly why it cannot."""

from __future__ import annotations

import contextlib
import fcntl
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from xverse.config import UserError, load
from xverse.train import PretrainRecipe, pretrain
from xverse.train.checkpoint import checkpoints
from xverse.train.plot import read_metrics


def train(recipe: Path, *overrides: str) -> Path:
    return pretrain(load(PretrainRecipe, recipe, overrides))


@contextlib.contextmanager
def started(recipe: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of its own process, which does not outlive the block."""
    command = [sys.executable, "-m", "xverse.cli", "pretrain", str(recipe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_records(process: subprocess.Popen[str], out: Path, count: int) -> None:
    """Until the run has added ``count`` records."""
    file = out / "metrics.jsonl"
    before = file.read_bytes().count(b"\n") if file.exists() else 0
    while process.poll() is None:
        if file.exists() and file.read_bytes().count(b"\n") >= before + count:
            return
        time.sleep(0.002)
    raise AssertionError(f"ended with {process.returncode}: {process.communicate()[1]}")


def losses(out: Path) -> dict[int, tuple[float, float, float]]:
    records = [record for record in read_metrics(out / "metrics.jsonl") if "loss" in record]
    return {record["step"]: (record["loss"], record["grad_norm"], record["lr"]) for record in records}


def validations(out: Path) -> dict[int, dict[str, float]]:
    records = read_metrics(out / "metrics.jsonl")
    return {record["step"]: record["valid"] for record in records if "valid" in record}


def same_tensors(a: Path, b: Path) -> bool:
    one, other = load_file(a), load_file(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_killed_and_interrupted_run_equals_an_unharmed_one(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """At random moments, in bfloat16, with validation and a checkpoint every few steps for kill -9 to hit."""
    recipe = write_recipe({"valid_tokens": 200}, steps=90, checkpoint_every=3, validate_every=5)
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # shown by pytest where the test fails
    chance = random.Random(seed)
    out = tmp_path / "run"
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        with started(recipe) as process:
            wait_for_records(process, out, chance.randint(1, 12))
            time.sleep(chance.uniform(0, 0.03))
            process.send_signal(number)
            stdout, stderr = process.communicate()
        assert (process.returncode, stdout) == (-9 if number == signal.SIGKILL else 130, "")
        if number != signal.SIGKILL:
            *_, said, last = stderr.splitlines()
            stopped = re.fullmatch(
                r"stopped after step (\d+); (step-\d+) is saved, the same command goes on from it", said
            )
            assert last == "xverse: interrupted"
            assert "Traceback" not in stderr
            assert stopped
            done = int(stopped[1])
            assert checkpoints(out)[-1].name == stopped[2] == f"step-{done:08d}"
            assert list(losses(out)) == list(range(done))
    (out / "checkpoints" / ".step-00000099.abc.tmp").mkdir()  # as kill -9 during writing leaves it
    train(recipe)

    unharmed = tmp_path / "unharmed"
    train(recipe, f"out={unharmed}")
    assert list(losses(unharmed)) == list(range(90))
    assert losses(out) == losses(unharmed)
    for step, figures in validations(out).items():  # an interrupted run saves first and may skip one
        assert figures == validations(unharmed)[step]
    for file in (
        "model/model.safetensors",
        "checkpoints/step-00000090/model.safetensors",
        "checkpoints/step-00000090/optimizer.safetensors",
    ):
        assert same_tensors(out / file, unharmed / file)
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == [
        "step-00000087",
        "step-00000090",
    ]


def test_order_of_data_is_a_function_of_the_step(fit_tiny: Callable[..., object], tmp_path: Path) -> None:
    whole, fresh = tmp_path / "whole", tmp_path / "fresh"
    fit_tiny(whole, steps=12, checkpoint_every=5, keep_checkpoints=9)
    shutil.copytree(whole / "checkpoints" / "step-00000005", fresh / "checkpoints" / "step-00000005")
    fit_tiny(fresh, steps=12)
    assert losses(fresh) == {step: values for step, values in losses(whole).items() if step >= 5}


def test_finished_run_only_writes_its_model_again(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(steps=3)
    train(recipe)
    (tmp_path / "run" / "model" / "model.safetensors").unlink()
    before = losses(tmp_path / "run")
    capsys.readouterr()
    assert same_tensors(
        train(recipe) / "model.safetensors", checkpoints(tmp_path / "run")[-1] / "model.safetensors"
    )
    assert "this run is finished (3 steps)" in capsys.readouterr().err.replace("\n", " ")
    assert losses(tmp_path / "run") == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("model.safetensors", truncate, "incomplete|invalid|buffer|header|metadata"),
        ("optimizer.safetensors", truncate, "incomplete|invalid|buffer|header|metadata"),
        ("optimizer.safetensors", Path.unlink, "No such file"),
        ("state.json", lambda path: path.write_text("{"), "Expecting"),
        ("state.json", lambda path: path.write_text('{"step": 4}'), "identity"),
    ],
)
def test_damaged_checkpoint_is_named_and_the_one_before_serves(
    name: str,
    damage: Callable[[Path], object],
    reason: str,
    fit_tiny: Callable[..., object],
    tmp_path: Path,
) -> None:
    fit_tiny(tmp_path, steps=4, checkpoint_every=2)
    whole = losses(tmp_path)
    newest = checkpoints(tmp_path)[-1]
    damage(newest / name)
    with pytest.raises(UserError) as caught:
        fit_tiny(tmp_path, steps=4)
    message = str(caught.value)
    assert message.startswith(f"{newest}: this checkpoint cannot be read (")
    assert message.endswith("delete it to resume before it")
    assert "\n" not in message
    assert re.search(reason, message, re.IGNORECASE)
    shutil.rmtree(newest)
    fit_tiny(tmp_path, steps=4)
    assert losses(tmp_path) == whole


def test_checkpoint_of_other_tensors_is_refused(fit_tiny: Callable[..., object], tmp_path: Path) -> None:
    """Among them shapes that copying would broadcast silently."""
    fit_tiny(tmp_path, steps=2)
    file = checkpoints(tmp_path)[-1] / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"][:1].clone()}, file)
    with pytest.raises(UserError, match=r"'lm_head.weight' is \[1, 32\], not \["):
        fit_tiny(tmp_path, steps=2)
    tensors.pop("model.norm.weight")
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"has no 'model\.norm\.weight'"):
        fit_tiny(tmp_path, steps=2)


def test_another_recipe_in_the_same_folder_is_refused_by_key(
    write_recipe: Callable[..., Path], tmp_path: Path, tiny_shape: dict[str, int]
) -> None:
    recipe = write_recipe(steps=2)
    train(recipe)
    wider = {**tiny_shape, "hidden_size": 64}
    for override, said in (
        ("train.learning_rate=0.001", "learning_rate = 0.003, not 0.001"),
        ("train.steps=3", "steps = 2, not 3"),
        ("seed=7", "seed = 0, not 7"),
        ("mixture.weights={en: 1}", "mixture.en = "),
        (f"shape={wider}", "shape.hidden_size = 32, not 64"),  # not a complaint about tensors
    ):
        with pytest.raises(UserError) as caught:
            train(recipe, override)
        assert f"{tmp_path / 'run'}: this run was begun with {said}" in str(caught.value)
    train(recipe, "train.log_every=1", "train.checkpoint_every=1", "valid_tokens=10")  # decide no loss


def test_other_text_is_another_run_but_older_checkpoints_are_read(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Checkpoints written before the data's digest was recorded have no such key."""
    recipe = write_recipe(steps=2)
    train(recipe)
    file = checkpoints(tmp_path / "run")[-1] / "state.json"
    state = json.loads(file.read_text())
    state["identity"]["data"] = "of other text"
    file.write_text(json.dumps(state))
    with pytest.raises(UserError, match="begun with data = of other text"):
        train(recipe)
    del state["identity"]["data"]
    file.write_text(json.dumps(state))
    train(recipe)


def test_two_processes_in_one_folder_are_refused(fit_tiny: Callable[..., object], tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training in this folder"):
            fit_tiny(tmp_path, steps=2)
    fit_tiny(tmp_path, steps=2)


def test_full_disk_leaves_the_checkpoints_before(fit_tiny: Callable[..., object], tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the optimizer's tensors no longer fit."""
    resource = pytest.importorskip("resource")
    fit_tiny(tmp_path, steps=4, checkpoint_every=2)
    whole = losses(tmp_path)
    first, last = checkpoints(tmp_path)
    limit = (last / "model.safetensors").stat().st_size + 5000
    shutil.rmtree(last)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError) as caught:
            fit_tiny(tmp_path, steps=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == f"{last}: File too large; nothing was written"
    assert list((tmp_path / "checkpoints").iterdir()) == [first]
    fit_tiny(tmp_path, steps=4)
    assert losses(tmp_path) == whole
