"""Two processes compute one process's losses: the document's command under DeepSpeed, FSDP2, torchrun's DDP.

Starting processes costs more than training here, so that a launch proves several things.
"""

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

from tests import forkserver
from xverse.cli import main
from xverse.formats import load_model, save_hf
from xverse.train.plot import read_metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT / "src"),
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


def run(name: str, *arguments: str) -> None:
    """A launcher's own command. It and the processes that it starts are forked, but not by DeepSpeed, which
    has more than one level of launchers."""
    pipe, command = subprocess.PIPE, [sys.executable, str(Path(sys.executable).with_name(name)), *arguments]
    start = subprocess.Popen if name == "deepspeed" else forkserver.Launcher
    with start(command, env=ENVIRONMENT, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as started:
        try:
            _, errors = started.communicate(timeout=280)
        finally:
            started.kill()
    assert started.returncode == 0, errors[-3000:]


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
    assert max(alone) - min(alone) > 5 * tolerance, "there is something to be seen"
    assert together == pytest.approx(alone, abs=tolerance)


def alone(document: dict[str, str], out: Path) -> dict[str, str]:
    """The same command for one process, which holds both batches."""
    kept = {name: value for name, value in document.items() if name != "deepspeed"}
    return {**kept, "output_dir": str(out), "per_device_train_batch_size": "8"}


def test_accelerate_with_fsdp_and_without(document, flags, tmp_path) -> None:
    document |= {"learning_rate": "1e-3", "bf16": "false"}
    assert main(["finetune", *flags(alone(document, tmp_path / "one"))]) == 0
    runs = [flags({**document, "output_dir": str(tmp_path / name)}) for name in ("fsdp", "ddp")]
    launcher = ["launch", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    launcher += ["--dynamo_backend=no", "--use_fsdp", "--fsdp_version=2"]  # which it starts with torchrun
    launcher += [f"--main_process_port={free_port()}", "tests/finetune/several_runs.py"]
    run("accelerate", *launcher, json.dumps(runs))
    for name in ("fsdp", "ddp"):
        same_curves(tmp_path / "one", tmp_path / name, 1e-4)
        found, expected = load_model(tmp_path / name), load_model(tmp_path / "one")
        for one, other in zip(found.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert (tmp_path / "fsdp" / "checkpoint-4" / "pytorch_model_fsdp_0").is_dir(), "it was sharded"
    sharded, plain = (load_model(tmp_path / name / "checkpoint-4") for name in ("fsdp", "ddp"))
    for (name, one), other in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_the_documents_command_as_written(document, flags, tmp_path, tiny_model, tiny_tokenizer) -> None:
    """ZeRO-2 in bfloat16 on two processes, against one process without DeepSpeed. The base is stored in
    bfloat16, as XVERSE's are: DeepSpeed would round one of float32 before it begins."""
    save_hf(tiny_model, tiny_tokenizer, tmp_path / "narrow", torch.bfloat16)
    document |= {"model_name_or_path": str(tmp_path / "narrow"), "deepspeed": "deepspeed.json"}
    assert main(["finetune", *flags(alone(document, tmp_path / "one"))]) == 0
    words = flags({**document, "output_dir": str(tmp_path / "two")})
    run("deepspeed", "--num_gpus=2", f"--master_port={free_port()}", "src/train_bash.py", *words)
    same_curves(tmp_path / "one", tmp_path / "two", 1e-3)
    assert load_model(tmp_path / "two").lm_head.weight.dtype == torch.bfloat16
    assert list((tmp_path / "two" / "checkpoint-4").glob("global_step4/*optim_states.pt"))


def test_two_ways_to_shard_are_one_too_many(document, flags, capsys, monkeypatch) -> None:
    pytest.importorskip("deepspeed")
    document |= {"deepspeed": "deepspeed.json"}
    assert main(["finetune", *flags({**document, "fsdp": "full_shard"})]) == 2
    assert "use one of them" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(["finetune", *flags(document)]) == 2
    assert "use one of them" in capsys.readouterr().err
    document.pop("deepspeed")
    assert main(["finetune", *flags(document)]) == 2
    assert "launch with torchrun" in capsys.readouterr().err
