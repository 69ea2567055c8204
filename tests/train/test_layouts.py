"""Every layout of two and four processes computes what one process does, and reads every other's checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from xverse.train.plot import read_metrics

from . import processes

# name: (processes, keys of TrainConfig); fsdp is over what the other degrees leave
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "FSDP": (2, {}),
    "TP": (2, {"tensor": 2}),
    "CP": (2, {"context": 2, "micro_batch_size": 4}),
    "PP": (2, {"pipeline": 2, "micro_batch_size": 2}),
    "DDP of 4": (4, {"parallel": "ddp", "micro_batch_size": 1}),
    "HSDP": (4, {"replicate": 2, "micro_batch_size": 1}),
    "TP × FSDP": (4, {"tensor": 2, "micro_batch_size": 2}),
    "CP × FSDP": (4, {"context": 2}),
    "TP × CP": (4, {"tensor": 2, "context": 2}),
    "PP × FSDP": (4, {"pipeline": 2, "micro_batch_size": 2}),
}


def job(name: str, out: Path, **more: Any) -> dict[str, Any]:
    return {"out": str(out), "train": {"parallel": "fsdp", **LAYOUTS[name][1]}, **more}


def launch(folder: Path, count: int, jobs: list[dict[str, Any]]) -> None:
    file = folder / f"jobs-{count}.json"
    file.write_text(json.dumps({"jobs": jobs, "processes": count}))
    done = subprocess.run(
        [sys.executable, processes.__file__, str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each layout by its name, the run ``one`` of a single process, and ``chain``,
    begun by one process and taken over by each layout in turn for two steps."""
    folder = tmp_path_factory.mktemp("layouts")
    chain, stop = folder / "chain", 1
    often = {"checkpoint_every": 1, "validate_every": 0}
    processes.train({"out": str(folder / "one"), "train": {}})
    processes.train({"out": str(chain), "train": often, "stop": stop})
    whole = [folder / "one" / "checkpoints" / "step-00000010"]
    for count in (2, 4):
        names = [name for name, (size, _) in LAYOUTS.items() if size == count]
        jobs = [job(name, folder / name) for name in names]
        for name in names:
            whole.append(folder / name / "checkpoints" / "step-00000010")
        for name in names:
            stop += 2
            each = job(name, chain, stop=stop)
            jobs.append({**each, "train": {**each["train"], **often}})
        jobs += [job(name, folder, load=[str(path) for path in whole]) for name in names]
        launch(folder, count, jobs)
    return folder


def curve(out: Path) -> list[tuple[int, float, float]]:
    records = [record for record in read_metrics(out / "metrics.jsonl") if "loss" in record]
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records]


def check(found: list[tuple[int, float, float]], expected: list[tuple[int, float, float]]) -> None:
    assert [step for step, _, _ in found] == [step for step, _, _ in expected]
    for (step, loss, norm), (_, wanted, wanted_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(wanted, rel=1e-5), step
        assert norm == pytest.approx(wanted_norm, rel=1e-5), step


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str, runs: Path) -> None:
    one = curve(runs / "one")
    assert len(one) == 20
    assert all(norm > processes.BASE["grad_clip"] for _, _, norm in one)
    check(curve(runs / name), one)
    validations = [
        [record["valid"]["loss"] for record in read_metrics(out / "metrics.jsonl") if "valid" in record]
        for out in (runs / name, runs / "one")
    ]
    assert len(validations[0]) == 2
    assert validations[0] == pytest.approx(validations[1], rel=1e-5)
    expected = load_file(runs / "one" / "model.safetensors")
    found = load_file(runs / name / "model.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert_close(tensor, expected[key], atol=1e-4, rtol=0)


def test_checkpoints_go_from_layout_to_layout(runs: Path) -> None:
    """One after the other takes a run over, and the last one ends it. (Reading each other's tensors exactly,
    every layout those of all before it, is asserted in the processes.)"""
    check(curve(runs / "chain"), curve(runs / "one"))


def test_each_process_writes_what_it_holds(runs: Path) -> None:
    for name in ("HSDP", "TP × FSDP", "PP × FSDP"):
        files = list((runs / name / "checkpoints" / "step-00000020").glob("*.safetensors"))
        total = sum(file.stat().st_size for file in files)
        one = sum(
            file.stat().st_size for file in (runs / "one" / "checkpoints/step-00000020").glob("*.safetensors")
        )
        assert len(files) == 4
        assert total < 1.1 * one, "nothing is written twice"
