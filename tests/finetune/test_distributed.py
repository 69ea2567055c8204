"""The document's command as written, on two processes: DeepSpeed ZeRO-2, and torchrun."""

from __future__ import annotations

import importlib.util
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


def test_torchrun_equals_one_process(document, flags, tmp_path) -> None:
    document |= {"learning_rate": "1e-3", "bf16": "false"}
    both = {**document, "output_dir": str(tmp_path / "two"), "per_device_train_batch_size": "4"}
    alone = {**document, "output_dir": str(tmp_path / "one"), "per_device_train_batch_size": "8"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    run([*launcher, f"--master_port={free_port()}"], flags(both))
    run([sys.executable], flags(alone))
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(one) == len(two) > 8
    assert two == pytest.approx(one, abs=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_zero_2_equals_one_process(document, flags, tmp_path) -> None:
    both = {**document, "output_dir": str(tmp_path / "two"), "deepspeed": "deepspeed.json"}
    alone = {**document, "output_dir": str(tmp_path / "one"), "per_device_train_batch_size": "8"}
    run(["deepspeed", "--num_gpus=2", f"--master_port={free_port()}"], flags(both))
    run([sys.executable], flags(alone))
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(one) == len(two) > 8
    assert two == pytest.approx(one, abs=1e-3)
    assert load_model(tmp_path / "two").lm_head.weight.dtype == torch.bfloat16
    assert list((tmp_path / "two" / "checkpoint-4").glob("global_step4/*optim_states.pt"))
