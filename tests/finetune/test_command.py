"""``xverse finetune`` with the flags of XVERSE-7B's README, in one process: train, resume, save, refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from xverse.cli import main
from xverse.formats import load_model
from xverse.train.plot import read_metrics


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl") if "loss" in record]


def held_out(out: Path) -> list[float]:
    return [record["valid"]["all"] for record in read_metrics(out / "metrics.jsonl") if "valid" in record]


def test_it_learns_keeps_the_best_and_leaves_model_curve_and_card(document, flags, tmp_path, capsys) -> None:
    document |= {"learning_rate": "5e-3", "val_size": "4", "num_train_epochs": "4"}
    assert main(["finetune", *flags(document)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    out = tmp_path / "out"
    assert losses(out)[-1] < 0.5 * losses(out)[0]
    assert (out / "loss.png").stat().st_size > 1000
    state = json.loads((out / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert state["best_metric"] == pytest.approx(min(held_out(out)))
    result, kept = load_model(out).state_dict(), load_model(best).state_dict()
    assert all(torch.equal(result[name], kept[name]) for name in result)
    card = (out / "README.md").read_text()
    for message in (
        "alpaca_gpt4_en: 40 examples",
        "4 held out",
        "loss.png",
        "learning_rate: 0.005",
        best.name,
    ):
        assert message in card
    assert main(["chat", "--model", str(out), "--ask", "say hello 0", "--max-new-tokens", "3"]) == 0
    assert json.loads((out / "tokenizer_config.json").read_text())["padding_side"] == "right"


def test_a_run_goes_on_from_its_checkpoint_with_the_same_losses(document, flags, tmp_path) -> None:
    document.pop("load_best_model_at_end")
    document |= {"learning_rate": "1e-3"}
    assert main(["finetune", *flags(document)]) == 0
    whole, half = tmp_path / "out", tmp_path / "half"
    half.mkdir()
    shutil.copytree(whole / "checkpoint-4", half / "checkpoint-4")
    shutil.copy(whole / "finetune.json", half)
    document["output_dir"] = str(half)
    assert main(["finetune", *flags(document)]) == 0
    assert losses(half) == losses(whole)[4:]
    assert held_out(half)[0] == held_out(whole)[1]
    one, other = load_model(whole).state_dict(), load_model(half).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_folder_of_another_run_is_refused(document, flags, tmp_path, capsys) -> None:
    document |= {"num_train_epochs": "1", "plot_loss": "false"}
    assert main(["finetune", *flags(document)]) == 0
    assert main(["finetune", *flags({**document, "learning_rate": "1e-4"})]) == 2
    assert "learning_rate (2e-05 → 0.0001)" in capsys.readouterr().err
    assert main(["finetune", *flags({**document, "dataset": "other"})]) == 2
    assert main(["finetune", *flags({**document, "dataset": "other", "overwrite_output_dir": ""})]) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    assert main(["finetune", *flags({**document, "output_dir": str(tmp_path / "mine")})]) == 2
    assert "already holds files" in capsys.readouterr().err


def test_packing_learns_the_same_data_in_fewer_rows(document, flags, tmp_path) -> None:
    document |= {"packing": "", "cutoff_len": "128", "learning_rate": "5e-3", "num_train_epochs": "6"}
    document |= {"per_device_train_batch_size": "1"}
    assert main(["finetune", *flags(document)]) == 0
    assert losses(tmp_path / "out")[-1] < 0.6 * losses(tmp_path / "out")[0]


def test_continued_pretraining_and_frozen_layers(document, flags, base, tmp_path) -> None:
    (Path(document["dataset_dir"]) / "text.txt").write_text("the sun rises in the east\n" * 40)
    document |= {"stage": "pt", "dataset": "text.txt", "cutoff_len": "64", "learning_rate": "5e-3"}
    document |= {"finetuning_type": "freeze", "freeze_trainable_layers": "1", "num_train_epochs": "6"}
    document |= {"per_device_train_batch_size": "1", "eval_steps": "2", "save_steps": "2"}
    assert main(["finetune", *flags(document)]) == 0
    out = tmp_path / "out"
    assert losses(out)[-1] < losses(out)[0]
    before, after = load_model(base).state_dict(), load_model(out).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("model.layers.1.") for name in changed)


def test_evaluation_alone_prints_the_loss(document, flags, capsys) -> None:
    for name in ("do_train", "load_best_model_at_end", "plot_loss"):
        document.pop(name)
    assert main(["finetune", *flags({**document, "do_eval": "", "eval_dataset": "other"})]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert 5 < metrics["eval_loss"] < 8


def test_early_stopping(document, flags, tmp_path) -> None:
    document |= {"learning_rate": "0", "early_stopping_steps": "1", "eval_steps": "1", "save_steps": "1"}
    assert main(["finetune", *flags(document)]) == 0
    assert len(losses(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "alpaca_gtp4_en"}, "did you mean 'alpaca_gpt4_en'"),
        ({"model_name_or_path": "nowhere"}, "no model 'nowhere'"),
        ({"deepspeed": "ds.json"}, "no such file"),
        ({"finetuning_type": "freeze", "freeze_trainable_layers": "9"}, "has 2 layers"),
        ({"finetuning_type": "lora", "lora_target": "w_proj"}, "no module 'w_proj'"),
        ({"adapter_name_or_path": "x"}, "needs finetuning_type lora"),
        ({"save_steps": "3"}, "multiple"),
        ({"lr_scheduler_type": "cosin"}, "cosin"),
        ({"eval_dataset": "none"}, "no dataset 'none'"),
        ({"enable_liger_kernel": ""}, "use_liger_kernel needs CUDA"),
        ({"group_by_length": "", "packing": ""}, "cannot be combined with packing"),
    ],
)
def test_mistakes_are_one_line(document, flags, capsys, change, message) -> None:
    if "lora_target" in change:
        pytest.importorskip("peft")
    if "deepspeed" in change:
        pytest.importorskip("deepspeed")
    capsys.readouterr()
    assert main(["finetune", *flags({**document, **change})]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
