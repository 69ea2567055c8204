"""A run that is killed goes on as if nothing had been, streamed or not; half a checkpoint is passed over."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import forkserver
from tests.object_store import object_store
from xverse.cli import main
from xverse.formats import ModelDirectory, load_model
from xverse.place import MARKS
from xverse.train.plot import read_metrics


def curve(out: Path) -> list[tuple[float, float]]:
    records = read_metrics(out / "metrics.jsonl")
    kept = {(r["step"], "valid" in r): r.get("loss") or r["valid"]["all"] for r in records}
    return sorted((step, loss) for (step, _), loss in kept.items())


def same_runs(one: Path, other: Path) -> None:
    assert curve(one) == curve(other)
    first, second = load_model(one).state_dict(), load_model(other).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_killed_it_goes_on_exactly(document, flags, tmp_path) -> None:
    document |= {"learning_rate": "1e-3", "num_train_epochs": "10", "load_best_model_at_end": "false"}
    document |= {"eval_steps": "5", "save_steps": "5"}
    whole = {**document, "output_dir": str(tmp_path / "whole")}
    assert main(["finetune", *flags(whole)]) == 0
    command = [sys.executable, "-m", "xverse.cli", "finetune", *flags(document)]
    # The same number of threads: sums in another order would differ in the last bit.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = forkserver.Popen(command, env={**os.environ, **threads}, stderr=subprocess.PIPE)
    out, deadline = tmp_path / "out", time.monotonic() + 400
    while not (out / "checkpoint-10" / "trainer_state.json").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(out.glob("*.safetensors")), "it was killed before its end"
    half = out / "checkpoint-999"  # as it looks while it is written
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert main(["finetune", *flags(document)]) == 0
    assert not half.exists()
    same_runs(tmp_path / "whole", out)


def test_a_stream_goes_on_exactly_and_holds_the_whole_data(document, flags, tmp_path, capsys) -> None:
    folder = Path(document["dataset_dir"])
    rows = json.loads((folder / "small.json").read_text())
    (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document |= {"streaming": "", "buffer_size": "16", "max_steps": "8", "dataset": "many.jsonl"}
    document |= {"val_size": "4", "packing": "", "cutoff_len": "64", "per_device_train_batch_size": "1"}
    document |= {"load_best_model_at_end": "false", "learning_rate": "1e-3"}
    assert main(["finetune", *flags(document)]) == 0
    whole, half = tmp_path / "out", tmp_path / "half"
    half.mkdir()
    for name in ("finetune.json", "metrics.jsonl"):
        shutil.copy(whole / name, half)
    shutil.copytree(whole / "checkpoint-4", half / "checkpoint-4")
    assert main(["finetune", *flags({**document, "output_dir": str(half)})]) == 0
    same_runs(whole, half)
    for change, message in (
        ({"max_steps": "-1"}, "needs max_steps"),
        ({"val_size": "0.1"}, "set val_size to a number"),
        ({"val_size": "40"}, "to be held out"),
    ):
        assert main(["finetune", *flags({**document, **change, "output_dir": str(tmp_path / "o")})]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_trackers(document, flags, tmp_path, capsys, monkeypatch, name) -> None:
    document |= {"report_to": name, "max_steps": "2", "load_best_model_at_end": "false"}
    try:
        module = importlib.import_module(name)
    except ImportError:
        assert main(["finetune", *flags(document)]) == 2
        message = f"--report_to {name} needs {name}, which is not installed; run: pip install -e '.[track]'"
        assert message in capsys.readouterr().err
        return
    for key, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    if name == "wandb":
        module.teardown()  # another test's service would write into that test's folder
    assert main(["finetune", *flags(document)]) == 0
    written = {"tensorboard": "**/events.out.tfevents*", "wandb": "wandb/offline-run-*"}
    assert list(tmp_path.glob(written[name]))


def test_a_run_at_a_url_goes_on_on_another_machine(document, flags, tmp_path, monkeypatch, capsys) -> None:
    """Its checkpoints are there, complete and as many as are kept; the model is there at the end."""
    with object_store() as store:
        document |= {"learning_rate": "1e-3", "load_best_model_at_end": "false", "save_steps": "2"}
        document |= {"save_total_limit": "2", "evaluation_strategy": "no"}
        assert main(["finetune", *flags({**document, "max_steps": "6"})]) == 0
        document |= {"output_dir": "s3://bucket/run", "max_steps": "6"}
        monkeypatch.setenv("XVERSE_CACHE", str(tmp_path / "a"))
        store.matches, store.failures = (
            lambda method, path: method == "PUT" and "checkpoint-6/" in path,
            10**6,
        )
        monkeypatch.setattr("xverse.remote.ATTEMPTS", 1)
        assert main(["finetune", *flags(document)]) == 2
        assert "run the same command again to send it" in capsys.readouterr().err
        store.reset()
        names = {name.split("/")[0] for name in store.names("run") if name.endswith(MARKS)}
        assert names == {"checkpoint-2", "checkpoint-4"}
        monkeypatch.setenv("XVERSE_CACHE", str(tmp_path / "b"))  # of another machine
        assert main(["finetune", *flags(document)]) == 0
        said = capsys.readouterr()
        assert said.out == "s3://bucket/run\n"
        assert "resuming from" in said.err
        assert "checkpoint-4" in said.err
        names = {name.split("/")[0] for name in store.names("run") if name.endswith(MARKS)}
        assert names == {"checkpoint-4", "checkpoint-6", MARKS}
        monkeypatch.setenv("XVERSE_CACHE", str(tmp_path / "c"))
        expected = load_model(tmp_path / "out").state_dict()
        for name in ("s3://bucket/run", "s3://bucket/run/checkpoint-6"):
            found = load_model(ModelDirectory.named(name)).state_dict()
            assert all(torch.equal(found[key], expected[key]) for key in expected)
        monkeypatch.setenv("XVERSE_CACHE", str(tmp_path / "b"))
        store.files.rm(f"bucket/run/{MARKS}")  # as if it had been killed while it sent the model
        assert main(["finetune", *flags(document)]) == 0
        assert MARKS in store.names("run")
        assert main(["finetune", *flags({**document, "overwrite_output_dir": "", "max_steps": "2"})]) == 0
        names = {name.split("/")[0] for name in store.names("run") if name.endswith(MARKS)}
        assert names == {"checkpoint-2", MARKS}
