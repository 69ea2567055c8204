"""A full disk costs no step that a checkpoint could hold, on real file systems of that size."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from xverse.log import JsonlLog

# In namespaces of its own it may mount file systems, which vanish with it.
PROGRAM = """
import hashlib, json, shutil, subprocess, sys
from pathlib import Path
from xverse.cli import main

disk, recipe, rows = map(Path, sys.argv[1:])
found = {}

def mount(name, size):
    path = disk / name
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(size)}", "tmpfs", str(path)], check=True)
    return path

def size(path):  # in whole pages, as tmpfs stores it
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in path.rglob("*") if file.is_file())

def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]

def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()

whole = disk / "whole"
assert main(["pretrain", str(recipe), f"out={whole}"]) == 0
one = size(whole / "checkpoints" / "step-00000012")
for name, room in (("two", 2.5 * one), ("one", 1.5 * one)):
    out = mount(name, room) / "run"
    if name == "two":
        (out / "checkpoints" / "damaged-step-00000099").mkdir(parents=True)
        (out / "checkpoints" / "damaged-step-00000099" / "x").write_bytes(bytes(4096))
    code = main(["pretrain", str(recipe), f"out={out}"])
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    step = json.loads((out / "checkpoints" / "step-00000012" / "state.json").read_text())["step"]
    found[name] = [code, kept, losses(out) == losses(whole), step]
base, run = whole / "model", disk / "tuned"
words = ["--stage", "sft", "--model_name_or_path", str(base), "--do_train", "--dataset", str(rows),
    "--finetuning_type", "full", "--max_steps", "6", "--save_steps", "2", "--logging_steps", "1",
    "--per_device_train_batch_size", "1"]
assert main(["finetune", *words, "--output_dir", str(run)]) == 0
one = size(run / "checkpoint-6")
out = mount("small", 2.5 * one) / "out"
code = main(["finetune", *words, "--output_dir", str(out)])
kept = sorted(path.name for path in out.glob("*checkpoint-*"))
equal = digest(out / "model.safetensors") == digest(run / "model.safetensors")
found["finetune"] = [code, kept, equal, losses(out) == losses(run)]
print(json.dumps(found))
"""


def test_the_oldest_checkpoint_makes_room_for_the_next(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    probe = [*unshare, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("no small file system can be mounted here")
    recipe = write_recipe(steps=12, checkpoint_every=3, dtype="float32", keep_checkpoints=3)
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": f"say {i}", "output": "good morning"} for i in range(8)]))
    command = [*unshare, sys.executable, "-c", PROGRAM, str(tmp_path / "disk"), str(recipe), str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # The third one is written again after the next step, and the last one at once.
    assert found["two"][1:] == [["step-00000010", "step-00000012"], True, 12], done.stderr
    assert found["one"][1:] == [["step-00000012"], True, 12], done.stderr
    assert found["finetune"] == [0, ["checkpoint-4", "checkpoint-6"], True, True], done.stderr


def test_records_wait_for_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = tmp_path / "full.jsonl"
    full.symlink_to("/dev/full")
    log = JsonlLog(full)
    for step in range(3):
        log.write({"step": step})
    assert capsys.readouterr().err.count("No space left on device") == 1
    full.unlink()
    file = tmp_path / "metrics.jsonl"
    log._file.close()
    log._file = file.open("ab", buffering=0)  # as if there were room now
    log.write({"step": 3})
    log.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 1, 2, 3]
