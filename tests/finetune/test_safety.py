"""A fine-tuning run ends once, begins from its seed, and keeps what it learnt: lock, digests, full disks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from xverse.cli import main
from xverse.config import UserError
from xverse.files import alone
from xverse.finetune.resume import checkpoints_of, clear_unfinished
from xverse.formats import ModelDirectory, load_model, save_hf
from xverse.model.transformer import XverseForCausalLM, init_weights
from xverse.place import MARKS
from xverse.train.plot import read_metrics


@pytest.fixture
def quick(document: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Six steps of full fine-tuning in float32, with a checkpoint after every second."""
    kept = ("stage", "model_name_or_path", "do_train", "dataset", "dataset_dir")
    return {
        **{key: document[key] for key in kept},
        "finetuning_type": "full", "output_dir": str(tmp_path / "out"), "max_steps": "6", "save_steps": "2",
        "per_device_train_batch_size": "2", "learning_rate": "1e-3", "lr_scheduler_type": "constant",
        "logging_steps": "1",
    }  # fmt: skip


def digest(out: Path, name: str = "model.safetensors") -> str:
    return hashlib.sha256((out / name).read_bytes()).hexdigest()


def steps(out: Path) -> list[int]:
    return [r["step"] for r in read_metrics(out / "metrics.jsonl") if "loss" in r]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def unfinished(out: Path) -> None:
    """As a kill between the last checkpoint and the model leaves it."""
    state = json.loads((out / "finetune.json").read_text())
    del state["finished"]
    (out / "finetune.json").write_text(json.dumps(state))
    (out / "model.safetensors").unlink()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_finished_run_does_nothing_and_one_killed_at_its_end_only_writes(
    quick, flags, tmp_path, capsys, streaming
) -> None:
    out = tmp_path / "out"
    if streaming:
        rows = json.loads((Path(quick["dataset_dir"]) / "small.json").read_text())
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (Path(quick["dataset_dir"]) / "many.jsonl").write_text(lines)
        quick |= {"streaming": "", "dataset": "many.jsonl"}
    assert main(["finetune", *flags(quick)]) == 0
    before = digest(out), sorted(path.name for path in out.iterdir())
    capsys.readouterr()
    assert main(["finetune", *flags(quick)]) == 0
    assert "this run is finished" in said(capsys)
    assert (digest(out), sorted(path.name for path in out.iterdir())) == before
    unfinished(out)
    assert main(["finetune", *flags(quick)]) == 0
    assert "resuming from" in said(capsys)
    assert (digest(out), sorted(path.name for path in out.iterdir())) == before
    assert steps(out) == list(range(6))
    assert main(["finetune", *flags({**quick, "max_steps": "8"})]) == 2
    assert "this run began with other max_steps (6 → 8)" in said(capsys)


def test_a_run_that_stopped_early_stays_ended(quick, flags, tmp_path, capsys) -> None:
    quick |= {"max_steps": "20", "eval_strategy": "steps", "eval_steps": "2", "load_best_model_at_end": ""}
    quick |= {"early_stopping_steps": "1", "learning_rate": "0.5"}  # so that it gets worse at once
    out = tmp_path / "out"
    assert main(["finetune", *flags(quick)]) == 0
    ended = steps(out)
    assert len(ended) < 20
    before = digest(out)
    unfinished(out)
    assert main(["finetune", *flags(quick)]) == 0
    assert steps(out) == ended
    assert digest(out) == before


@pytest.mark.parametrize("kind", ["lora", "qlora", "dpo"])
def test_the_seed_decides_an_adapter(quick, flags, tmp_path, wide_config, tiny_tokenizer, kind) -> None:
    quick |= {"finetuning_type": "lora", "max_steps": "1", "lora_rank": "2", "lora_dropout": "0.1"}
    if kind == "qlora":
        model = XverseForCausalLM(wide_config)
        init_weights(model, seed=0)
        save_hf(model, tiny_tokenizer, tmp_path / "wide", torch.float32)
        quick |= {"quantization_bit": "4", "model_name_or_path": str(tmp_path / "wide")}
    if kind == "dpo":
        row = {"instruction": "a", "input": "", "chosen": "good", "rejected": "bad"}
        (Path(quick["dataset_dir"]) / "pairs.json").write_text(json.dumps([row] * 8))
        info = json.loads((Path(quick["dataset_dir"]) / "dataset_info.json").read_text())
        info["pairs"] = {"file_name": "pairs.json", "ranking": True}
        (Path(quick["dataset_dir"]) / "dataset_info.json").write_text(json.dumps(info))
        quick |= {"stage": "dpo", "dataset": "pairs"}
    digests = []
    for name, seed in (("a", "42"), ("b", "42"), ("c", "43")):
        torch.manual_seed(len(digests))  # what was drawn before must not matter
        target = {**quick, "output_dir": str(tmp_path / name), "seed": seed}
        assert main(["finetune", *flags(target)]) == 0
        digests.append(digest(tmp_path / name, "adapter_model.safetensors"))
    assert digests[0] == digests[1] != digests[2]


def test_a_second_run_in_the_folder_is_refused_by_process_and_host(quick, flags, tmp_path, capsys) -> None:
    (tmp_path / "out").mkdir()
    with alone(tmp_path / "out" / ".lock", "busy"):
        assert main(["finetune", *flags(quick)]) == 2
    assert f"another process is training in this folder (process {os.getpid()} on " in said(capsys)
    assert not any((tmp_path / "out").iterdir())


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(data if how == "flip" else data[: len(data) // 2])


@pytest.mark.parametrize("how", ["cut", "flip", "gone"])
def test_damage_to_any_file_of_a_checkpoint_is_found(finished_run, tmp_path, capsys, how) -> None:
    source, _ = finished_run
    names = sorted(path.name for path in (source / "checkpoint-6").iterdir() if path.name != MARKS)
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= set(names)
    for name in names:
        out = tmp_path / name
        for step in (4, 6):
            shutil.copytree(source / f"checkpoint-{step}", out / f"checkpoint-{step}")
        damage(out / "checkpoint-6" / name, how)
        clear_unfinished(out)
        found = checkpoints_of(out).newest()
        assert found is not None
        assert found[0].name == "checkpoint-4", name
        assert not (out / "checkpoint-6").exists()


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    finished_run, tmp_path, flags, capsys
) -> None:
    source, values = finished_run
    out = Path(shutil.copytree(source, tmp_path / "out"))
    unfinished(out)
    damage(out / "checkpoint-6" / "optimizer.pt", "cut")
    assert main(["finetune", *flags({**values, "output_dir": str(out)})]) == 0
    assert "optimizer.pt has " in (text := said(capsys))
    assert "going back to checkpoint-4" in text
    assert digest(out) == digest(source)
    assert sorted(path.name for path in out.glob("*checkpoint-6")) == ["checkpoint-6", "damaged-checkpoint-6"]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, tiny_config, tiny_tokenizer) -> tuple[Path, dict[str, str]]:
    """Six steps, a folder that tests copy, and their settings."""
    folder = tmp_path_factory.mktemp("finished")
    model = XverseForCausalLM(tiny_config)
    init_weights(model, seed=0)
    save_hf(model, tiny_tokenizer, folder / "base", torch.float32)
    rows = [{"instruction": f"say hello {i}", "output": "good morning " * (i % 4 + 1)} for i in range(20)]
    (folder / "rows.json").write_text(json.dumps(rows))
    values = {
        "stage": "sft", "model_name_or_path": str(folder / "base"), "do_train": "true",
        "dataset": str(folder / "rows.json"), "finetuning_type": "full", "output_dir": str(folder / "out"),
        "max_steps": "6", "save_steps": "2", "per_device_train_batch_size": "2", "learning_rate": "1e-3",
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    words = [word for name, value in values.items() for word in (f"--{name}", value)]
    assert main(["finetune", *words]) == 0
    return folder / "out", values


def test_checkpoints_are_models_and_adapters_say_how_they_are_used(
    finished_run, quick, flags, tmp_path, capsys
) -> None:
    source, _ = finished_run
    cut = Path(shutil.copytree(source, tmp_path / "cut"))
    for name in ("model.safetensors", "config.json"):
        (cut / name).unlink()
    assert ModelDirectory.of(cut).path == cut / "checkpoint-6"
    with (cut / "checkpoint-6" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert ModelDirectory.of(cut).path == cut / "checkpoint-4"
    assert load_model(ModelDirectory.of(cut)).lm_head.weight.isfinite().all()
    with pytest.raises(UserError, match="this checkpoint cannot be read"):
        ModelDirectory.of(cut / "checkpoint-6")
    quick |= {"finetuning_type": "lora", "max_steps": "2", "lora_rank": "2"}
    assert main(["finetune", *flags(quick)]) == 0
    base, out = quick["model_name_or_path"], tmp_path / "out"
    for path in (out, out / "checkpoint-2"):
        with pytest.raises(UserError, match=f"holds an adapter; give --model {base} --adapter {path}"):
            ModelDirectory.of(path)
        capsys.readouterr()
        target = tmp_path / f"merged-{path.name}"
        words = ["--model", base, "--adapter", str(path), "--format", "hf", "--out", str(target)]
        assert main(["export", *words]) == 0
        assert "does not record its base" not in said(capsys)


@pytest.mark.parametrize(("share", "code"), [(None, 2), ("0.7", 0)])
@pytest.mark.parametrize("streaming", [False, True])
def test_too_many_unusable_items_stop_a_run(quick, flags, tmp_path, capsys, share, code, streaming) -> None:
    rows = [{"instruction": "x", "output": "y" if i % 3 == 0 else ""} for i in range(30)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quick |= {"dataset": str(tmp_path / "mixed.jsonl"), "max_steps": "1"}
    if share:
        quick["max_bad_share"] = share
    if streaming:
        quick["streaming"] = ""
    assert main(["finetune", *flags(quick)]) == code
    if code:
        message = "20 of 30 items cannot be used (20 empty text), more than max_bad_share 0.05 allows"
        assert message in said(capsys)
        assert not (tmp_path / "out").exists(), "nothing was written"


def test_on_a_full_disk_older_checkpoints_make_room(finished_run, flags, small_disk, tmp_path) -> None:
    source, values = finished_run
    one = sum(-(-file.stat().st_size // 4096) * 4096 for file in (source / "checkpoint-6").iterdir())
    subprocess.run(["mount", "-o", f"remount,size={int(2.6 * one)}", str(small_disk)], check=True)
    out = small_disk / "out"
    assert main(["finetune", *flags({**values, "output_dir": str(out)})]) == 0
    assert sorted(path.name for path in out.glob("*checkpoint-*"))[-1] == "checkpoint-6"
    assert not (out / "checkpoint-2").exists()
    assert digest(out) == digest(source)


def test_a_disk_too_small_is_named(finished_run, flags, small_disk, capsys) -> None:
    _, values = finished_run
    subprocess.run(["mount", "-o", "remount,size=64k", str(small_disk)], check=True)
    assert main(["finetune", *flags({**values, "output_dir": str(small_disk / "out")})]) == 2
    text = said(capsys)
    assert "checkpoint-2 was not saved (No space left on device); training continues" in text
    assert "No space left on device" in text.rpartition("xverse: ")[2]
