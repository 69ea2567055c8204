"""Killed, interrupted, damaged: a run goes on as if nothing had been, or says clearly why it cannot."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
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

from tests import forkserver
from xverse.config import UserError, load
from xverse.data.feed import ORDERS
from xverse.files import read_sealed, sealed
from xverse.train import PretrainRecipe, pretrain
from xverse.train.checkpoint import kept
from xverse.train.plot import read_metrics

pytestmark = pytest.mark.slow

TensorsOf = Callable[[Path], dict[str, torch.Tensor]]


def train(recipe: Path, *overrides: str) -> Path:
    return pretrain(load(PretrainRecipe, recipe, overrides))


@contextlib.contextmanager
def started(recipe: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of its own process, which does not outlive the block."""
    command = [sys.executable, "-m", "xverse.cli", "pretrain", str(recipe)]
    with forkserver.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
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
    write_recipe: Callable[..., Path], tmp_path: Path, tensors_of: TensorsOf
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
                r"stopped after step (\d+); (step-\d+) is saved; run the same command to continue from it",
                said,
            )
            assert last == "xverse: interrupted"
            assert "Traceback" not in stderr
            assert stopped
            done = int(stopped[1])
            assert kept(out).all()[-1].name == stopped[2] == f"step-{done:08d}"
            assert list(losses(out)) == list(range(done))
    (out / "checkpoints" / ".step-00000099.abc.tmp").mkdir()  # as kill -9 during writing leaves it
    train(recipe)

    unharmed = tmp_path / "unharmed"
    train(recipe, f"out={unharmed}")
    assert list(losses(unharmed)) == list(range(90))
    assert losses(out) == losses(unharmed)
    for step, figures in validations(out).items():  # an interrupted run saves first and may skip one
        assert figures == validations(unharmed)[step]
    assert same_tensors(out / "model" / "model.safetensors", unharmed / "model" / "model.safetensors")
    saved, expected = (tensors_of(path / "checkpoints" / "step-00000090") for path in (out, unharmed))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
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
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    tensors_of: TensorsOf,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = write_recipe(steps=3)
    train(recipe)
    (tmp_path / "run" / "model" / "model.safetensors").unlink()
    before = losses(tmp_path / "run")
    capsys.readouterr()
    again = load_file(train(recipe) / "model.safetensors")
    saved = tensors_of(kept(tmp_path / "run").all()[-1])
    assert all(torch.equal(saved[f"model.{name}"], tensor) for name, tensor in again.items())
    assert "this run is finished (3 steps)" in capsys.readouterr().err.replace("\n", " ")
    assert losses(tmp_path / "run") == before


def shard(checkpoint: Path) -> Path:
    (file,) = checkpoint.glob("*.safetensors")
    return file


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    """One bit, as a bad disk does: the file can be read as before."""
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def change(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        (shard, truncate, r"has \d+ bytes, not \d+"),
        (shard, flip, "has another SHA-256"),
        (shard, Path.unlink, "No such file"),
        (lambda path: path / "state.json", lambda path: path.write_text("{"), "Expecting"),
        (lambda path: path / "state.json", lambda path: path.write_text('{"step": 4}'), "identity"),
        (
            lambda path: path / "state.json",
            lambda path: change(path, '"step": 4', '"step": 5'),
            "has another SHA",
        ),
    ],
)
def test_damaged_checkpoint_is_named_and_the_one_before_serves(
    file: Callable[[Path], Path],
    damage: Callable[[Path], object],
    reason: str,
    fit_tiny: Callable[..., object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fit_tiny(tmp_path, steps=4, checkpoint_every=2)
    whole = losses(tmp_path)
    first, last = kept(tmp_path).all()
    damage(file(last))
    capsys.readouterr()
    fit_tiny(tmp_path, steps=4)
    said = capsys.readouterr().err
    assert re.search(rf"WARNING: {last}: this checkpoint cannot be read \(.*{reason}", said)
    assert "going back to step-00000002" in said
    assert losses(tmp_path) == whole
    assert (last.parent / "damaged-step-00000004").is_dir()
    damage(file(last))
    shutil.rmtree(first)
    with pytest.raises(UserError) as caught:
        fit_tiny(tmp_path, steps=4)
    message = str(caught.value)
    assert message.startswith(f"{last}: this checkpoint cannot be read (")
    assert message.endswith("and no earlier one is intact; delete it to start again")
    assert "\n" not in message


def rewrite(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Put other tensors into a checkpoint, with right digests."""
    file = shard(checkpoint)
    offsets = {name: {"saved_offsets": [0] * tensor.dim()} for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)})
    state = read_sealed(checkpoint / "state.json")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    state["files"] = {file.name: [file.stat().st_size, digest]}
    (checkpoint / "state.json").write_text(sealed(state))


def test_checkpoint_of_other_tensors_is_refused(
    fit_tiny: Callable[..., object], tmp_path: Path, tensors_of: TensorsOf
) -> None:
    """Among them shapes that copying would broadcast silently."""
    fit_tiny(tmp_path, steps=2)
    checkpoint = kept(tmp_path).all()[-1]
    tensors = tensors_of(checkpoint)
    rewrite(checkpoint, {**tensors, "model.lm_head.weight": tensors["model.lm_head.weight"][:1].clone()})
    with pytest.raises(UserError, match=r"'model.lm_head.weight' is \[1, 32\], not \["):
        fit_tiny(tmp_path, steps=2)
    tensors.pop("model.model.norm.weight")
    rewrite(checkpoint, tensors)
    with pytest.raises(UserError, match=r"has no 'model\.model\.norm\.weight'"):
        fit_tiny(tmp_path, steps=2)


def test_a_checkpoint_without_a_list_of_its_files_is_refused_in_one_line(
    fit_tiny: Callable[..., object], tmp_path: Path
) -> None:
    fit_tiny(tmp_path, steps=2)
    file = kept(tmp_path).all()[-1] / "state.json"
    state = read_sealed(file)
    del state["files"]
    file.write_text(sealed(state))
    with pytest.raises(UserError, match=r"cannot be read \(state.json does not list the files\)") as caught:
        fit_tiny(tmp_path, steps=2)
    assert "\n" not in str(caught.value)


def test_which_checkpoints_stay(fit_tiny: Callable[..., object], tmp_path: Path) -> None:
    fit_tiny(tmp_path, steps=11, checkpoint_every=1, keep_checkpoints=2, keep_every=4)
    assert [int(path.name[5:]) for path in kept(tmp_path).all()] == [4, 8, 10, 11]


def test_another_recipe_in_the_same_folder_is_refused_by_key(
    write_recipe: Callable[..., Path], tmp_path: Path, tiny_shape: dict[str, int]
) -> None:
    recipe = write_recipe(steps=2)
    train(recipe)
    wider = {**tiny_shape, "hidden_size": 64}
    for override, said in (
        ("train.learning_rate=0.001", "learning_rate = 0.003, not 0.001"),
        ("train.beta1=0.8", "beta1 = 0.9, not 0.8"),
        ("seed=7", "seed = 0, not 7"),
        ("mixture.weights={en: 1}", "mixture.en = "),
        (f"shape={wider}", "shape.hidden_size = 32, not 64"),  # not a complaint about tensors
    ):
        with pytest.raises(UserError) as caught:
            train(recipe, override)
        assert f"{tmp_path / 'run'}: this run was begun with {said}" in str(caught.value)
    train(recipe, "train.log_every=1", "train.checkpoint_every=1", "valid_tokens=10")  # decide no loss


def test_a_run_begun_with_another_order_of_documents_is_refused(
    fit_tiny: Callable[..., object], tmp_path: Path
) -> None:
    fit_tiny(tmp_path, steps=2, identity={"documents": ORDERS[0]})
    said = (
        "this run was begun with documents = shuffled as a whole, not shuffled in blocks of 256 runs of 256"
    )
    with pytest.raises(UserError, match=said):
        fit_tiny(tmp_path, steps=2, identity={"documents": ORDERS[1]})
    fit_tiny(tmp_path, steps=2, identity={"documents": ORDERS[0]})


def test_other_text_is_another_run(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = write_recipe(steps=2)
    train(recipe)
    file = kept(tmp_path / "run").all()[-1] / "state.json"
    state = read_sealed(file)
    state["identity"]["data"] = "of other text"
    file.write_text(sealed(state))
    with pytest.raises(UserError, match="begun with data = of other text"):
        train(recipe)


def test_two_processes_in_one_folder_are_refused(fit_tiny: Callable[..., object], tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training in this folder"):
            fit_tiny(tmp_path, steps=2)
    fit_tiny(tmp_path, steps=2)


def test_full_disk_training_goes_on_and_the_last_good_checkpoint_stays(
    fit_tiny: Callable[..., object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands for the disk: the tensors no longer fit."""
    resource = pytest.importorskip("resource")
    fit_tiny(tmp_path, steps=8, checkpoint_every=2, keep_checkpoints=9)
    whole = losses(tmp_path)
    first, *others = kept(tmp_path).all()
    limit = shard(first).stat().st_size - 5000
    for other in others:
        shutil.rmtree(other)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    capsys.readouterr()
    try:
        with pytest.raises(UserError) as caught:
            fit_tiny(tmp_path, steps=8, checkpoint_every=2, keep_checkpoints=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    for step in (4, 6, 8):
        assert f"WARNING: step-{step:08d} was not saved (File too large)" in said
    assert str(caught.value) == f"{others[-1]}: File too large; nothing was written"
    assert list((tmp_path / "checkpoints").iterdir()) == [first]
    fit_tiny(tmp_path, steps=8)
    assert losses(tmp_path) == whole
