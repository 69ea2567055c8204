"""The choice of the device, with the answers of PyTorch and the driver imitated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xverse import device, nvidia
from xverse.config import UserError
from xverse.device import compute_device, describe, is_lost, weights_dtype, why_no_gpu

ALL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


def imitate(monkeypatch: Any, *capabilities: tuple[int, int], built: list[str] = ALL) -> None:
    """A machine with these GPUs, and PyTorch for the architectures ``built``."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capabilities[_index(index)])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: f"GPU {_index(index)}")


def _index(index: Any) -> int:
    return index.index if isinstance(index, torch.device) else index


def smi(monkeypatch: Any, driver: str = "", *capabilities: tuple[int, int], problem: str = "") -> None:
    monkeypatch.setattr(nvidia, "cards", lambda: nvidia.Cards(driver, capabilities, problem))


def test_auto_takes_the_gpu_that_is_there(monkeypatch: Any) -> None:
    imitate(monkeypatch, (9, 0))
    assert compute_device() == torch.device("cuda", 0) == compute_device("cuda")
    assert compute_device("cpu") == torch.device("cpu")
    assert describe(compute_device()) == "running on cuda:0: GPU 0, compute capability 9.0"
    assert describe(torch.device("cpu"), "cpu") == "running on the CPU, as chosen by --device"
    assert weights_dtype(compute_device()) == torch.bfloat16
    assert weights_dtype(torch.device("cpu")) is None


def test_each_process_takes_its_own_gpu(monkeypatch: Any) -> None:
    imitate(monkeypatch, (9, 0), (9, 0))
    assert compute_device(process=1) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="this machine has 2; launch at most 2"):
        compute_device(process=2)


def test_a_gpu_without_machine_code_is_passed_over(monkeypatch: Any) -> None:
    imitate(monkeypatch, (7, 0), (8, 9))
    assert compute_device() == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"cuda:0 has compute capability 7\.0, and PyTorch .* another build"):
        compute_device("cuda:0")
    imitate(monkeypatch, (7, 0))
    assert compute_device() == torch.device("cpu")
    assert "compute capability 7.0" in describe(torch.device("cpu"))
    imitate(monkeypatch, (10, 3), built=["sm_90"])
    with pytest.raises(UserError, match="update PyTorch"):
        compute_device("cuda")
    imitate(monkeypatch, (13, 0))
    assert compute_device("cuda") == torch.device("cuda", 0)  # from PTX


def test_turing_computes_in_float16(monkeypatch: Any) -> None:
    imitate(monkeypatch, (7, 5))
    assert weights_dtype(compute_device()) == torch.float16


@pytest.mark.parametrize(
    ("cuda", "found", "reason"),
    [
        ("13.2", ("535.104.05", (8, 0)), "needs driver 580 or newer.*pip install --force-reinstall"),
        ("13.0", ("470.82", (8, 0)), "needs driver 580.*update the driver"),
        (None, ("580.65.06", (9, 0)), "is built without CUDA, although there is an NVIDIA GPU"),
        ("13.0", ("580.65.06", (9, 0)), "finds no CUDA device.*CUDA_VISIBLE_DEVICES"),
        ("13.0", ("",), "no GPU found"),
    ],
)
def test_why_there_is_no_gpu(monkeypatch: Any, cuda: str | None, found: Any, reason: str) -> None:
    imitate(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    smi(monkeypatch, *found)
    assert compute_device() == torch.device("cpu")
    with pytest.raises(UserError, match=f"--device cuda: .*{reason}") as caught:
        compute_device("cuda")
    assert "\n" not in str(caught.value)
    assert why_no_gpu() in describe(torch.device("cpu"))


def test_a_driver_that_fails(monkeypatch: Any) -> None:
    imitate(monkeypatch)
    smi(monkeypatch, problem="Driver/library version mismatch")
    assert "version mismatch" in why_no_gpu()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:7", "there are cuda:0 to cuda:1"),
        ("mps", "no Apple GPU"),
        ("xpu", "does not run on xpu"),
        ("npu:0", "does not run on npu:0"),
        ("cude", "did you mean 'cuda'"),
        ("cuda:x", "unknown device"),
        ("cuda:-1", "unknown device"),
        ("", "unknown device"),
    ],
)
def test_wrong_names(monkeypatch: Any, name: str, message: str) -> None:
    imitate(monkeypatch, (9, 0), (9, 0))
    with pytest.raises(UserError, match=f"--device.*{message}"):
        compute_device(name)


def test_a_lost_device_differs_from_full_memory() -> None:
    assert is_lost(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert is_lost(torch.AcceleratorError("CUDA error: device-side assert triggered"))
    assert not is_lost(torch.cuda.OutOfMemoryError("CUDA out of memory."))
    assert not is_lost(ValueError("CUDA error"))
    assert device.guard(torch.device("cpu")).__enter__() is None
