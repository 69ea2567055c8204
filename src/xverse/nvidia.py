"""NVIDIA GPUs as the driver reports them, and the build of PyTorch that runs on them.

``make`` runs this file before any package is installed: it uses the standard library only. ``pip`` arguments
go to stdout, the reason to stderr.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TORCH = "2.13.0"  # tested
_INDEX = "https://download.pytorch.org/whl/"
_QUERY = ("nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader")
# CUDA → the oldest driver that runs it (CUDA's release notes, minor version compatibility).
_DRIVERS = {13: 580, 12: 525, 11: 450}
_CUDA13_LEAST, _CUDA12_LEAST, _CUDA12_MOST = (7, 5), (5, 0), (9, 0)  # compute capabilities in the builds

Capability = tuple[int, int]


@dataclass(frozen=True)
class Cards:
    """What ``nvidia-smi`` reports. ``problem``: why it reports nothing although it is installed."""

    driver: str = ""
    capabilities: tuple[Capability | None, ...] = ()
    problem: str = ""

    @property
    def release(self) -> int:
        """The driver's branch, such as 535; 0 without a driver."""
        match = re.match(r"\d+", self.driver)
        return int(match[0]) if match else 0

    @property
    def known(self) -> list[Capability]:
        return [capability for capability in self.capabilities if capability is not None]

    def __str__(self) -> str:
        count = len(self.capabilities)
        kinds = ", ".join(f"{major}.{minor}" for major, minor in sorted(set(self.known)))
        compute = f", compute capability {kinds}" if kinds else ""
        return (
            f"{'an' if count == 1 else count} NVIDIA GPU{'s' * (count > 1)} (driver {self.driver}{compute})"
        )


def cards() -> Cards:
    """The GPUs and the driver of this machine; without any, an object that is false in ``capabilities``."""
    code, text = _run(*_QUERY)
    if code and re.search(r"compute_cap.*not a valid field", text):  # drivers before 510
        code, text = _run(_QUERY[0], "--query-gpu=driver_version", _QUERY[2])
    if code is None:
        return Cards()
    driver, capabilities = "", []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if not re.fullmatch(r"\d+(\.\d+)*", fields[0]):
            continue
        driver = driver or fields[0]
        number = re.fullmatch(r"(\d+)\.(\d+)", fields[1]) if len(fields) > 1 else None
        capabilities.append((int(number[1]), int(number[2])) if number else None)
    if code or not capabilities:
        return Cards(problem=" ".join(text.split())[:200] or "it lists no GPU")
    return Cards(driver, tuple(capabilities))


def driver_for(cuda: str) -> int:
    """The oldest driver branch for programs built with this CUDA version, such as "13.2"."""
    return _DRIVERS.get(int(cuda.partition(".")[0]), 0)


@dataclass(frozen=True)
class Build:
    """A build of PyTorch: ``tag`` is cpu, cu126, or "" for the one on PyPI (CUDA 13 on Linux), with the
    reason for the choice."""

    tag: str
    reason: str

    def arguments(self, index: str | None = None) -> list[str]:
        """Arguments of ``pip install``. ``index`` replaces the index of the build; "": only those that pip is
        configured with."""
        tag = self.tag if _wheel_tags() else ""
        requirement = f"torch=={TORCH}+{tag}" if tag == "cpu" or (tag and index == "") else f"torch=={TORCH}"
        if tag == "cpu":
            # No dependencies: the index serves this package alone.
            url = _INDEX + tag if index is None else index
            return ["--no-deps", *(["--extra-index-url", url] if url else []), requirement]
        if tag and index is None:
            return ["--index-url", _INDEX + tag, "torch>=2.11"]
        return [*(["--extra-index-url", index] if index else []), requirement]


def build_for(gpus: Cards) -> Build:
    """The build that runs on the GPUs of this machine; for GPUs of several kinds, on the least of them."""
    if not gpus.capabilities:
        problem = f"nvidia-smi fails ({gpus.problem})" if gpus.problem else "no NVIDIA GPU found"
        return Build("cpu", problem + _other_gpus())
    least, most = min(gpus.known, default=_CUDA13_LEAST), max(gpus.known, default=_CUDA13_LEAST)
    if gpus.release >= _DRIVERS[13] and least >= _CUDA13_LEAST:
        return Build("", f"{gpus}: PyPI's build, with CUDA 13")
    why = f"{gpus}: PyPI's build needs driver {_DRIVERS[13]} and compute capability 7.5"
    if gpus.release < _DRIVERS[12]:
        return Build(
            "cpu", f"{gpus}: too old for any current build; update the driver to {_DRIVERS[13]} or newer"
        )
    if least > _CUDA12_MOST:
        return Build("cpu", f"{why}; update the driver to {_DRIVERS[13]} or newer to use the GPU")
    if least < _CUDA12_LEAST:
        return Build("cpu", f"{gpus}: no current build supports a compute capability below 5.0")
    beyond = f"; a GPU above {_CUDA12_MOST[0]}.{_CUDA12_MOST[1]} stays unused" if most > _CUDA12_MOST else ""
    return Build("cu126", f"{why}; the build with CUDA 12.6 runs here{beyond}")


def pip_arguments(gpus: Cards, index: str | None) -> tuple[list[str], str]:
    """Arguments of ``pip install`` for PyTorch, and the reason. ``index`` is the user's choice: an index of
    one build (``…/cpu``, ``…/cu128``, ``…/rocm7.0``) decides alone, any other serves the build that fits."""
    tag = (index or "").rstrip("/").rpartition("/")[2]
    if index and re.fullmatch(r"(cu|rocm|xpu)[\d.]*", tag):
        return ["--index-url", index, "torch>=2.11"], f"TORCH_INDEX={index}"
    build = Build("cpu", f"TORCH_INDEX={index}") if tag == "cpu" else build_for(gpus)
    return build.arguments(index), build.reason


def install_hint(gpus: Cards) -> str:
    """What to do so that PyTorch runs on these GPUs."""
    build = build_for(gpus)
    if build.tag == "cpu":
        return f"update the driver to {_DRIVERS[13]} or newer"
    return f"pip install --force-reinstall {shlex.join(build.arguments())}"


def amd_gpu() -> bool:
    return Path("/dev/kfd").exists()


def ascend_npu() -> bool:
    return Path("/dev/davinci_manager").exists()


def _other_gpus() -> str:
    if amd_gpu():
        return (
            "; an AMD GPU is present: set TORCH_INDEX to PyTorch's index for your ROCm version to train and "
            "generate on it in bfloat16 (not measured)"
        )
    if ascend_npu():
        return "; an Ascend NPU is present: xverse runs on the CPU"
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return (
            "; Apple's GPU needs no other build: --device mps uses it for unquantised weights (not measured)"
        )
    return ""


def _wheel_tags() -> bool:
    """Whether PyTorch publishes separate builds for this system; macOS has only one."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")


def _run(*command: str) -> tuple[int | None, str]:
    """(exit code or None without the program, its output)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        return None, ""
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, done.stdout if not done.returncode else done.stdout + done.stderr


if __name__ == "__main__":
    chosen, why = pip_arguments(cards(), os.environ.get("TORCH_INDEX"))
    print(f"make: {why}", file=sys.stderr)
    print(shlex.join(chosen))
