"""``xverse pretrain`` from a recipe to a model directory, and its mistakes in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from xverse.cli import main
from xverse.config import UserError, build, load
from xverse.formats import load_model
from xverse.log import JsonlLog
from xverse.train import PretrainRecipe, pretrain
from xverse.train.checkpoint import kept
from xverse.train.plot import plot_loss, read_metrics

PNG = b"\x89PNG\r\n\x1a\n"


def test_run_leaves_model_curve_and_records(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    tiny_shape: dict[str, int],
    tensors_of: Callable[[Path], dict[str, torch.Tensor]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    assert main(["pretrain", str(write_recipe(steps=6, validate_every=3)), "train.log_every=2"]) == 0
    output = capsys.readouterr()
    out = tmp_path / "run"
    assert output.out == f"{out / 'model'}\n"
    assert "min left" in output.err
    assert {path.name for path in out.iterdir()} == {
        "checkpoints", "heartbeats", "loss.png", "metrics.jsonl", "model",
        "recipe.json", "report.md",
    }  # fmt: skip
    assert (out / "loss.png").read_bytes().startswith(PNG)
    report = (out / "report.md").read_text()
    assert "| steps | 6 applied, 0 skipped, 0 rollbacks |" in report
    assert "![loss](loss.png)" in report
    assert "MFU unknown" in report or torch.cuda.is_available()
    assert "| checkpoints | 1 stalled training for " in report
    assert "| exposed communication | none: one process |" in report
    assert "| all, predicted |" in report
    assert "memory of a process, predicted: " in output.err
    assert json.loads((out / "recipe.json").read_text())["shape"]["hidden_size"] == 32
    model = load_model(out / "model")
    assert model.config.hidden_size == tiny_shape["hidden_size"]
    saved = tensors_of(kept(out).all()[-1])
    for name, tensor in model.state_dict().items():
        assert torch.equal(saved[f"model.{name}"], tensor)


def refused(capsys: pytest.CaptureFixture[str], recipe: Path, *overrides: str) -> str:
    """The one line that a mistake gets on stderr, with exit code 2."""
    assert main(["pretrain", str(recipe), *overrides]) == 2
    output = capsys.readouterr()
    *_, line = output.err.splitlines()
    assert output.out == ""
    assert line.startswith("xverse: ")
    assert "Traceback" not in output.err
    return line


def test_mistakes_in_the_recipe_are_one_line(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(steps=2)
    for overrides, said in (
        (["train.lerning_rate=1"], "unknown key 'train.lerning_rate'; did you mean 'learning_rate'?"),
        (["sequence_lenght=8"], "unknown key 'sequence_lenght'; did you mean 'sequence_length'?"),
        (["shape.hiden_size=8"], "unknown key 'shape.hiden_size'; did you mean 'hidden_size'?"),
        (["shape.num_attention_heads=5"], "hidden_size 32 does not split into 5 heads"),
        (["shape=nanno"], "unknown shape 'nanno'; did you mean 'nano'?"),
        (["shape=nano"], "shape nano has a vocabulary of 12288, the tokenizer of"),
        (["shape=3"], "shape: expected str, found int '3'"),
        (["train.steps=0"], "train: steps must be positive, not 0"),
        (["train.dtype=float16"], "train: dtype: 'float16' is not one of bfloat16, float32"),
        (["sequence_length=9000"], "sequence_length 9000 exceeds the 8192 positions of shape of the recipe"),
        (["sequence_length=1"], "sequence_length must be at least 2"),
        (["initializer_range=-1"], "initializer_range must be positive"),
        (["valid_tokens=-1"], "valid_tokens must not be negative"),
        (["mixture.weights={eng: 1}"], "mixture: unknown source 'eng'; did you mean 'en'?"),
        ([f"data={tmp_path}"], "not a prepared folder (no train/ in it); run xverse data prepare first"),
        ([f"out={recipe}"], f"{recipe}: cannot be written"),
        ([f"out={recipe}/below"], f"{recipe}/below: cannot be written"),
    ):
        assert said in refused(capsys, recipe, *overrides)
    assert not (tmp_path / "run").exists()
    assert main(["pretrain", str(recipe)]) == 0
    capsys.readouterr()
    line = refused(capsys, recipe, "train.learning_rate=1e-4")
    assert "this run was begun with learning_rate = 0.003, not 0.0001" in line
    newest = kept(tmp_path / "run").all()[-1]
    next(newest.glob("*.safetensors")).write_bytes(b"\x08")
    assert f"{newest}: this checkpoint cannot be read" in refused(capsys, recipe)


def test_shape_is_a_name_or_the_keys_of_a_model(tmp_path: Path) -> None:
    values = {
        "data": "d", "out": "o", "sequence_length": 8,
        "train": {"steps": 1, "batch_size": 1, "learning_rate": 1},
    }  # fmt: skip
    assert build(PretrainRecipe, {**values, "shape": "mini"}, "r").shape == "mini"
    with pytest.raises(UserError, match="r: shape: missing keys 'vocab_size', 'intermediate_size', "):
        build(PretrainRecipe, {**values, "shape": {"hidden_size": 8}}, "r")


def test_records_of_steps_that_ran_twice_and_of_cut_lines(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"

    def write(*steps: int, loss: float) -> None:
        log = JsonlLog(file)
        for step in steps:
            log.write({"step": step, "loss": loss})
        log.close()

    write(0, 1, 2, loss=1.0)
    log = JsonlLog(file)
    log.write({"step": 2, "valid": {"all": 3.0}})
    log.close()
    write(3, 4, 5, loss=1.0)
    with file.open("a") as half:
        half.write('{"time": 1, "step": 6, "lo')
    write(3, 4, loss=2.0)
    records = read_metrics(file)
    assert [(r["step"], r.get("loss")) for r in records] == [
        (0, 1.0), (1, 1.0), (2, 1.0), (2, None), (3, 2.0), (4, 2.0),
    ]  # fmt: skip
    write(2, loss=3.0)  # before the validation of that step, which counts no more
    assert [(r["step"], r.get("loss")) for r in read_metrics(file)] == [(0, 1.0), (1, 1.0), (2, 3.0)]


def test_curve_of_many_sources_and_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert plot_loss(tmp_path, "nothing") is None
    assert "holds no steps" in capsys.readouterr().err.replace("\n", " ")
    log = JsonlLog(tmp_path / "metrics.jsonl")
    for step in range(50):
        log.write({"step": step, "loss": 9 / (step + 1)})
        if step % 20 == 19:
            log.write({"step": step, "valid": dict.fromkeys(("all", *"abcdefgh"), 2.0 - step / 50)})
    log.close()
    picture = plot_loss(tmp_path, "many", validation="bits per byte")
    assert picture is not None
    assert picture.read_bytes().startswith(PNG)


def test_pretraining_goes_on_from_a_model(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """A run that begins with another's model begins with its loss, and records where it came from."""
    first = pretrain(load(PretrainRecipe, write_recipe(steps=30, dtype="float32")))
    path = write_recipe({"model": str(first), "out": str(tmp_path / "more")}, steps=3, dtype="float32")
    pretrain(load(PretrainRecipe, path))
    before, after = (read_metrics(out / "metrics.jsonl") for out in (first.parent, tmp_path / "more"))
    assert after[0]["loss"] < before[0]["loss"] - 0.5
    fresh = write_recipe({"out": str(tmp_path / "more")}, steps=3, dtype="float32")
    with pytest.raises(UserError, match="was begun with model = "):
        pretrain(load(PretrainRecipe, fresh))


def test_a_model_that_does_not_fit_is_refused(
    write_recipe: Callable[..., Path], tiny_shape: dict[str, int], tmp_path: Path
) -> None:
    model = pretrain(load(PretrainRecipe, write_recipe(steps=1)))
    wide = {**tiny_shape, "intermediate_size": 96}
    path = write_recipe({"model": str(model), "shape": wide, "out": str(tmp_path / "other")}, steps=1)
    with pytest.raises(UserError, match="intermediate_size 64, but the recipe's shape has 96"):
        pretrain(load(PretrainRecipe, path))
