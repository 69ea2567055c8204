"""The wheel is complete: built and installed outside the checkout, it answers from the embedded model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    # Without isolation, because tests have no network; [dev] includes hatchling.
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    [path] = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel, in which this environment's packages are importable too."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=folder)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # .pth files in a folder that a .pth file names are ignored: an editable xverse there is not importable.
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (Path(site) / "packages.pth").write_text("\n".join(packages) + "\n")
    return python


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    expected = {
        path.relative_to(SOURCE).as_posix()
        for path in (SOURCE / "xverse").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }
    compiled = {"xverse/kernels/libxverse_kernels.so", "xverse/tokenizer/libxverse_bpe.so"}
    kernels = compiled if compiler() else set()
    recipes = {"xverse/finetune/recipes/deepspeed.json"}  # from recipes/, for `--deepspeed deepspeed.json`
    assert {name for name in names if name.startswith("xverse/")} == expected | kernels | recipes
    for licence in ("LICENSE", "NOTICE"):
        assert any(name.endswith(f".dist-info/licenses/{licence}") for name in names)
    assert wheel.stat().st_size < 30 * 2**20


def test_without_a_compiler_the_wheel_is_plain(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT)
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "CXX": "no-such-compiler"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "installed without its fast CPU kernels" in done.stdout + done.stderr
    [path] = tmp_path.glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(path).namelist() if name.endswith(".so")]


def compiler() -> str | None:
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def test_it_is_the_wheel_that_is_imported(python: Path, tmp_path: Path) -> None:
    code = "import xverse, torch; print(xverse.__file__); print(torch.__file__)"
    xverse_file, torch_file = run(python, "-c", code, cwd=tmp_path).split()
    assert Path(xverse_file).is_relative_to(python.parent.parent)
    assert not Path(torch_file).is_relative_to(python.parent.parent)


def test_it_answers(python: Path, tmp_path: Path) -> None:
    if not list((SOURCE / "xverse" / "assets" / "nano").glob("*.safetensors")):
        pytest.skip("this checkout has no embedded model")
    reply = run(python.parent / "xverse", "chat", "--ask", "你好", cwd=tmp_path)
    assert reply.strip()
    assert list(tmp_path.iterdir()) == []
