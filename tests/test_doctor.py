"""doctor reports what is really there: facts against other sources, measurements against plain sense."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from xverse import __version__, hardware
from xverse.cli import main
from xverse.commands import doctor


@pytest.fixture(scope="module")
def report() -> Any:
    result = subprocess.run(
        [sys.executable, "-m", "xverse.cli", "doctor", "--json"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_facts(report: Any) -> None:
    assert report["xverse"] == __version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["python"] == sys.version.split()[0]
    assert 1 <= report["cpu"]["cores"] <= (os.cpu_count() or 1)
    assert 0 < report["memory"]["total"] <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert len(report["measured"]["gpus"]) == torch.cuda.device_count()
    assert f"device         {report['device_reason']}" in doctor.render(report)
    assert report["device_reason"].startswith("running on")


def test_kernels(report: Any) -> None:
    from xverse.kernels.native import kernel_name

    assert report["kernels"] == kernel_name()
    assert f"kernels        {kernel_name()}" in doctor.render(report)
    assert "C++ compiler" in doctor.render({**report, "kernels": "torch"})


def test_extras(report: Any) -> None:
    assert {"dev", "track", "serve"} <= set(report["extras"])
    assert report["extras"]["dev"]["complete"], report["extras"]["dev"]  # the tests run in it
    assert report["extras"]["dev"]["packages"] > report["extras"]["track"]["packages"] > 0  # dev names track


def test_measurements(report: Any) -> None:
    measured = report["measured"]["cpu"]
    assert [row["threads"] for row in measured["bandwidth"]] == sorted({1, report["cpu"]["cores"]})
    for row in measured["bandwidth"]:
        assert len(row["samples"]) == 2
        assert all(1e8 < sample < 1e13 for sample in row["samples"])
    matmul = measured["matmul"]
    assert all(1e7 < flops < 1e15 for flops in matmul.values())  # bfloat16 without hardware: 5e7
    assert measured["bandwidth_buffer"] > report["cpu"]["last_level_cache"]


def test_text_names_what_is_missing(report: Any) -> None:
    changed = copy.deepcopy(report)
    changed["extras"]["track"] = {"packages": 1, "complete": False, "missing": ["matplotlib>=3.8"]}
    changed["measured"]["gpus"] = [
        {
            "name": "NVIDIA Unheard Of",
            "memory": 80 * 2**30,
            "capability": "9.9",
            "bandwidth_samples": [1e12, 2e12],
            "matmul_shape": [8192, 8192, 8192],
            "matmul": {"bfloat16": 5e14},
            "peak_bandwidth": None,
            "peak_bf16_flops": None,
        }
    ]
    text = doctor.render(changed)
    assert "missing matplotlib>=3.8: pip install -e '.[track]'" in text
    assert "1000 and 2000 GB/s (unknown)" in text
    assert "500.0 TFLOP/s (unknown)" in text


def test_peaks() -> None:
    h200 = hardware.device_peaks("NVIDIA H200")
    assert h200 is not None
    assert hardware.share(h200.bf16_flops / 2, h200.bf16_flops) == "50 %"
    for name in (
        "NVIDIA GeForce GTX 1080",
        "NVIDIA GH200 480GB",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "A100X",
    ):
        assert hardware.device_peaks(name) is None
    assert hardware.share(1e12, None) == hardware.share(1e12, math.inf) == "unknown"


def test_cores_respect_affinity() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity mask")
    code = "import os; from xverse import hardware; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
    result = subprocess.run(
        [sys.executable, "-c", code + "print(hardware.cores().usable)"], capture_output=True, text=True
    )
    assert result.stdout.strip() == "1"


@pytest.mark.parametrize(("quota", "usable"), [(None, 8), (0.5, 1), (2.5, 3), (64.0, 8)])
def test_cores_respect_quota(quota: float | None, usable: int) -> None:
    assert hardware.Cores(machine=16, affinity=8, quota=quota).usable == usable


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    hardware.read_bandwidth(torch.ones(2**20), threads=1, seconds=0.01)
    assert torch.get_num_threads() == before


def test_unknown_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--jsn"])
    assert stopped.value.code == 2
    assert "did you mean '--json'?" in capsys.readouterr().err
