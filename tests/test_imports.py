"""Imports point downwards, and what must start fast imports nothing heavy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ["torch", "transformers", "tokenizers", "numpy", "huggingface_hub"]


def lint_imports(source: Path) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(source)!r})\n"
    code += "from importlinter.cli import lint_imports_command; lint_imports_command()"
    options = ["--no-cache", "--no-logo", "--config", str(ROOT / "pyproject.toml")]
    return subprocess.run([sys.executable, "-c", code, *options], cwd=source, capture_output=True, text=True)


def test_every_import_points_downwards() -> None:
    result = lint_imports(ROOT / "src")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("line", ["from xverse import cli", "import xverse.commands"])
def test_an_upward_import_is_found(tmp_path: Path, line: str) -> None:
    shutil.copytree(ROOT / "src" / "xverse", tmp_path / "xverse", ignore=shutil.ignore_patterns("assets"))
    with (tmp_path / "xverse" / "config.py").open("a") as file:
        file.write(f"\n\ndef _upward() -> None:\n    {line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "xverse.config -> xverse.c" in result.stdout


@pytest.mark.parametrize("code", ["import xverse", "from xverse.cli import main; main(['--help'])"])
def test_start_is_light(code: str) -> None:
    report = f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    program = f"import atexit, sys; atexit.register(lambda: {report}); {code}"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stderr.strip() == "[]"
