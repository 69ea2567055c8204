"""``python -m benchmarks peers`` on the smallest shape, with the installed peers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forkserver

ROOT = Path(__file__).resolve().parents[2]


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", "peers", "--work-dir", str(tmp_path), *arguments]
    return forkserver.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)


@pytest.mark.thorough
@pytest.mark.parametrize(("part", "rival"), [("bf16", "transformers bf16"), ("int8", "llama.cpp Q8_0")])
def test_both_sides_are_timed_and_agree(tmp_path: Path, part: str, rival: str) -> None:
    if rival.startswith("llama.cpp"):
        pytest.importorskip("llama_cpp")
    done = run(tmp_path, "--shape", "nano", "--rounds", "1", "--threads", "1", "--only", part)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])["parts"][part]
    assert figures["engines"][rival]["same_logits"] > 0.99
    for piece in ("decode, context 16", "decode, context 512", "prefill 512"):
        for engine in (f"xverse {part}", rival):
            assert figures["pieces"][piece][engine]["tok_s"] > 0
    assert figures["pieces"]["decode, context 16"][rival]["read_gb_s"] > 0
    assert list(tmp_path.iterdir()) == []  # what it made is gone


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, "--shape", "nanno")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean 'nano'" in done.stderr
    done = run(tmp_path / "missing", "--shape", "nano")
    assert done.returncode == 2
    assert "no such directory" in done.stderr
