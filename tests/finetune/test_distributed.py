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
from typing import Any

import pytest
import torch

from tests import forkserver
from xverse.cli import main
from xverse.formats import load_model, save_hf
from xverse.kernels.linear import QuantLinear
from xverse.model import XverseForCausalLM, init_weights
from xverse.quant.methods import rtn
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
            _, errors = started.communicate(timeout=550)
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


def grpo_of(document: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A run that rewards replies of low ids."""
    (tmp_path / "own.py").write_text(
        "low = lambda completion_ids, **rest: [sum(i < 350 for i in r) / len(r) for r in completion_ids]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", f"{ENVIRONMENT['PYTHONPATH']}{os.pathsep}{tmp_path}")
    rows = [{"question": f"say hello {i}", "answer": str(i)} for i in range(16)]
    (Path(document["dataset_dir"]) / "questions.json").write_text(json.dumps(rows))
    kept = ("model_name_or_path", "do_train", "dataset_dir", "logging_steps", "per_device_train_batch_size")
    values = {"stage": "grpo", "dataset": "questions.json", "finetuning_type": "full", "allow_code": ""}
    values |= {"reward_funcs": "own:low", "max_completion_length": "8", "num_generations": "4"}
    values |= {"learning_rate": "1e-3", "max_steps": "4", "save_steps": "4"}
    return {**{key: document[key] for key in kept}, **values}


def qat_of(document: dict[str, str], tmp_path: Path, config: Any, tokenizer: Any) -> dict[str, str]:
    """A quantisation-aware run of a few steps."""
    model = XverseForCausalLM(config)
    init_weights(model, seed=0)
    save_hf(model, tokenizer, tmp_path / "wide", torch.float32)
    changed = {"model_name_or_path": str(tmp_path / "wide"), "quantization_aware": "int4", "max_steps": "4"}
    kept = {key: value for key, value in document.items() if key != "load_best_model_at_end"}
    return {**kept, **changed, "evaluation_strategy": "no"}


def check_grpo(one: Path, two: Path) -> None:
    """The same replies and rewards, whose losses differ by rounding."""
    first, second = ([r for r in read_metrics(out / "metrics.jsonl") if "reward" in r] for out in (one, two))
    assert len(first) == len(second) == 4
    assert [r["completion_length"] for r in second] == [r["completion_length"] for r in first]
    assert [r["reward"] for r in second] == pytest.approx([r["reward"] for r in first], abs=1e-9)
    assert [r["loss"] for r in second] == pytest.approx([r["loss"] for r in first], abs=1e-4)
    assert min(r["reward_std"] for r in first) > 0.01, "there is something to learn"
    for a, b in zip(load_model(one).parameters(), load_model(two).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert max(r["logprob_difference_max"] for r in second) < 1e-4, "generation sees the weights of training"


def check_qat(one: Path, two: Path) -> None:
    """The loss of one process, and the rounded model is the trained one's, rounded."""
    first, second = (
        [r["loss"] for r in read_metrics(out / "metrics.jsonl") if "loss" in r] for out in (one, two)
    )
    assert second == pytest.approx(first, abs=2e-3)
    assert first[-1] < first[0] - 0.02
    exact, written = load_model(two).state_dict(), load_model(two / "int4", torch.float32)
    layers = [(n, m) for n, m in written.named_modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 14
    for name, module in layers:
        expected = rtn(exact[f"{name}.weight"].float(), 4, 128).dequantize(torch.float32)
        assert torch.equal(module.dequantize(torch.float32), expected), name


@pytest.mark.thorough
def test_accelerate_with_fsdp_and_without(
    document, flags, tmp_path, wide_config, tiny_tokenizer, monkeypatch
) -> None:
    document |= {"learning_rate": "1e-3", "bf16": "false"}
    grpo, qat = (
        grpo_of(document, tmp_path, monkeypatch),
        qat_of(document, tmp_path, wide_config, tiny_tokenizer),
    )
    for values, name in ((document, "one"), (grpo, "grpo-one"), (qat, "qat-one")):
        assert main(["finetune", *flags(alone(values, tmp_path / name))]) == 0
    named = ((grpo, "grpo"), (qat, "qat"), (document, "fsdp"), (document, "ddp"))
    runs = [flags({**values, "output_dir": str(tmp_path / name)}) for values, name in named]
    launcher = ["launch", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    launcher += ["--dynamo_backend=no", "--use_fsdp", "--fsdp_version=2"]  # which it starts with torchrun
    launcher += [f"--main_process_port={free_port()}", "tests/finetune/several_runs.py"]
    run("accelerate", *launcher, json.dumps(runs))
    check_grpo(tmp_path / "grpo-one", tmp_path / "grpo")
    check_qat(tmp_path / "qat-one", tmp_path / "qat")
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
