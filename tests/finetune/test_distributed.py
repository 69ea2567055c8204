"""The document's command as written, on two processes: DeepSpeed ZeRO-2, and torchrun."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xverse.formats import load_model
from xverse.train.plot import read_metrics

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT / "src"),
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


def run(launcher: list[str], words: list[str]) -> None:
    command = [*launcher, "src/train_bash.py", *words]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def curve(out: Path) -> list[float]:
    records = read_metrics(out / "metrics.jsonl")
    return [r["loss"] if "loss" in r else r["valid"]["all"] for r in records]


def same_curves(one: Path, two: Path, tolerance: float) -> None:
    alone, together = curve(one), curve(two)
    assert len(alone) == len(together) > 8
    assert together == pytest.approx(alone, abs=tolerance)


def test_two_processes_equal_one_in_float32(document, flags, tmp_path) -> None:
    document |= {"learning_rate": "1e-3", "bf16": "false"}
    alone = {**document, "output_dir": str(tmp_path / "one"), "per_device_train_batch_size": "8"}
    run([sys.executable], flags(alone))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    both = {**document, "output_dir": str(tmp_path / "torchrun")}
    run([*launcher, f"--master_port={free_port()}"], flags(both))
    same_curves(tmp_path / "one", tmp_path / "torchrun", 1e-4)
    if importlib.util.find_spec("deepspeed") is None:
        return
    config = json.loads((ROOT / "recipes" / "sft" / "deepspeed.json").read_text())
    (tmp_path / "float32.json").write_text(json.dumps({**config, "bf16": {"enabled": "auto"}}))
    both = {**document, "output_dir": str(tmp_path / "zero"), "deepspeed": str(tmp_path / "float32.json")}
    run(["deepspeed", "--num_gpus=2", f"--master_port={free_port()}"], flags(both))
    same_curves(tmp_path / "one", tmp_path / "zero", 1e-4)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_the_documents_command_as_written(document, flags, tmp_path) -> None:
    """ZeRO-2 in bfloat16 on two processes and on one. (A run without DeepSpeed computes with float32 weights
    under autocast: another arithmetic, whose losses differ in the third decimal.)"""
    document |= {"deepspeed": "deepspeed.json"}
    both = {**document, "output_dir": str(tmp_path / "two")}
    alone = {**document, "output_dir": str(tmp_path / "one"), "per_device_train_batch_size": "8"}
    run(["deepspeed", "--num_gpus=2", f"--master_port={free_port()}"], flags(both))
    run(["deepspeed", "--num_gpus=1", f"--master_port={free_port()}"], flags(alone))
    same_curves(tmp_path / "one", tmp_path / "two", 1e-3)
    assert load_model(tmp_path / "two").lm_head.weight.dtype == torch.bfloat16
    assert list((tmp_path / "two" / "checkpoint-4").glob("global_step4/*optim_states.pt"))
