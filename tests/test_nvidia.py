"""The build of PyTorch by driver and compute capability, as `make` asks for it, with imitated nvidia-smi."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from xverse import nvidia

SCRIPT = nvidia.__file__
CPU = f"--no-deps --extra-index-url https://download.pytorch.org/whl/cpu torch=={nvidia.TORCH}+cpu"
PYPI = f"torch=={nvidia.TORCH}"
CUDA12 = "--index-url https://download.pytorch.org/whl/cu126 'torch>=2.11'"
linux = pytest.mark.skipif(sys.platform != "linux", reason="macOS has one build of PyTorch")


def imitate(folder: Path, *lines: str, code: int = 0) -> None:
    """A nvidia-smi in ``folder`` that prints ``lines``."""
    program = folder / "nvidia-smi"
    printed = "\n".join(f"echo {shlex.quote(line)}" for line in lines)
    program.write_text(f"#!/bin/sh\n{printed}\nexit {code}\n")
    program.chmod(0o755)


def asked(folder: Path, index: str | None = None) -> tuple[str, str]:
    """(pip's arguments, the reason) that make gets."""
    environment = {"PATH": f"{folder}", "HOME": str(folder)}
    if index is not None:
        environment["TORCH_INDEX"] = index
    done = subprocess.run(
        [sys.executable, "-P", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip(), done.stderr


@linux
@pytest.mark.parametrize(
    ("lines", "arguments", "reason"),
    [
        (["580.65.06, 9.0"], PYPI, "PyPI's build, with CUDA 13"),
        (["595.10, 12.0", "595.10, 7.5"], PYPI, "2 NVIDIA GPUs"),
        (["575.57.08, 9.0"], CUDA12, "needs driver 580"),
        (["535.104.05, 8.0"], CUDA12, "the build with CUDA 12.6 runs here"),
        (["580.65.06, 7.0"], CUDA12, "compute capability 7.0"),
        (["580.65.06, 9.0", "580.65.06, 7.0"], CUDA12, "compute capability 7.0, 9.0"),
        (["580.65.06, 12.0", "580.65.06, 6.1"], CUDA12, "a GPU above 9.0 stays unused"),
        (["570.86.10, 12.0"], CPU, "update the driver to 580 or newer to use the GPU"),
        (["470.82.01, 8.0"], CPU, "too old for any current build"),
        (["580.65.06, 3.5"], CPU, "below 5.0"),
        (["545.23.08, [N/A]"], CUDA12, "an NVIDIA GPU (driver 545.23.08)"),
    ],
)
def test_driver_and_capability_choose_the_build(
    tmp_path: Path, lines: list[str], arguments: str, reason: str
) -> None:
    imitate(tmp_path, *lines)
    found, why = asked(tmp_path)
    assert found == arguments
    assert reason in why
    assert why.count("\n") == 1


@linux
def test_without_a_working_driver_the_cpu_build(tmp_path: Path) -> None:
    assert asked(tmp_path)[0] == CPU
    imitate(tmp_path, "NVIDIA-SMI has failed because it could not communicate with the driver.", code=9)
    found, why = asked(tmp_path)
    assert found == CPU
    assert "could not communicate" in why


@linux
def test_an_old_nvidia_smi_without_compute_cap(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\ncase "$1" in *compute_cap*)\n'
        "echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2;; esac\necho 470.82.01\n"
    )
    program.chmod(0o755)
    assert "driver 470.82.01" in asked(tmp_path)[1]


@linux
@pytest.mark.parametrize(
    ("index", "arguments"),
    [
        ("", PYPI),
        ("https://mirror.example/pypi", f"--extra-index-url https://mirror.example/pypi {PYPI}"),
        ("https://download.pytorch.org/whl/cpu", CPU),
        (
            "https://download.pytorch.org/whl/cu128",
            "--index-url https://download.pytorch.org/whl/cu128 'torch>=2.11'",
        ),
        (
            "https://download.pytorch.org/whl/rocm7.0",
            "--index-url https://download.pytorch.org/whl/rocm7.0 'torch>=2.11'",
        ),
    ],
)
def test_torch_index_replaces_the_choice(tmp_path: Path, index: str, arguments: str) -> None:
    imitate(tmp_path, "580.65.06, 8.9")
    assert asked(tmp_path, index)[0] == arguments


@linux
def test_an_empty_index_is_pips_own(tmp_path: Path) -> None:
    assert asked(tmp_path, "")[0] == f"--no-deps torch=={nvidia.TORCH}+cpu"
    imitate(tmp_path, "535.104.05, 8.0")
    assert asked(tmp_path, "")[0] == f"torch=={nvidia.TORCH}+cu126"


def test_make_installs_what_the_script_prints() -> None:
    checkout = Path(SCRIPT).parents[2]
    if not (checkout / "Makefile").exists():
        pytest.skip("not a checkout")
    shown = subprocess.run(
        ["make", "-n", "-W", "pyproject.toml", "chat"],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "-P src/xverse/nvidia.py" in shown
    assert shown.index("nvidia.py") < shown.index("-e .")
    for value, line in (("", "TORCH_INDEX= "), ("http://x/cu128", "TORCH_INDEX=http://x/cu128 ")):
        environment = {**os.environ, "TORCH_INDEX": value}
        printed = subprocess.run(
            ["make"], cwd=checkout, env=environment, capture_output=True, text=True
        ).stdout
        assert line in printed
