"""Run the commands of the READMEs that this machine can run, in order, as a reader would.

A fenced shell, bash or python block has a comment on the line before it: ``<!-- test: run -->``, or
``<!-- test: skip -->`` with the reason before the arrow. All blocks run in one folder of links to the
checkout's files, so that they write nothing into the checkout.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(shell|bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARKER = re.compile(r"<!-- test: (run|skip (?P<reason>\S.*)) -->")


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    marker: str  # the line before the block

    @property
    def code(self) -> str:
        """What to type; for an interactive session, the lines after its prompts."""
        if ">>> " not in self.text:
            return self.text
        return "".join(line[4:] for line in self.text.splitlines(True) if line.startswith((">>> ", "... ")))


def blocks(name: str) -> list[Block]:
    text = (ROOT / name).read_text(encoding="utf-8")
    result = []
    for match in FENCE.finditer(text):
        before = text[: match.start()].splitlines()
        result.append(Block(match[1], match[2], before[-1] if before else ""))
    return result


def numbered() -> list[object]:
    numbers = enumerate(blocks("README.md"))
    return [pytest.param(block, id=f"{i}-{block.text.splitlines()[0][:40]}") for i, block in numbers]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("readme")
    for item in ROOT.iterdir():
        if item.name not in (".git", "runs", "build", "dist"):
            (path / item.name).symlink_to(item)
    return path


def missing(block: Block) -> str | None:
    """Why this machine cannot run the block, or None."""
    if "make " in block.text:
        ready = subprocess.run(["make", "-q", ".venv/.installed-core"], cwd=ROOT, capture_output=True)
        if ready.returncode != 0:
            return "the tests run outside make's .venv, whose set-up needs the network"
    if not list((ROOT / "src" / "xverse" / "assets" / "nano").glob("*.safetensors")):
        return "this checkout has no embedded model"
    return None


@pytest.mark.parametrize("block", numbered())
def test_block(block: Block, folder: Path) -> None:
    marker = MARKER.fullmatch(block.marker)
    assert marker, (
        f"the line before the block is {block.marker!r}; write <!-- test: run --> or a reason to skip"
    )
    if marker["reason"]:
        pytest.skip(marker["reason"])
    reason = missing(block)
    if reason:
        pytest.skip(reason)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-"] if block.language == "python" else ["bash", "-euo", "pipefail", "-s"]
    result = subprocess.run(
        command,
        input=block.code,
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_both_languages_hold_the_same_blocks() -> None:
    """Equal except for comments, which are in the language of the page, and for reasons to skip."""

    def essence(name: str) -> list[tuple[str, str, bool]]:
        comment = re.compile(r"(^|\s+)# .*$", re.MULTILINE)
        return [(b.language, comment.sub("", b.text), "skip" in b.marker) for b in blocks(name)]

    assert essence("README.md") == essence("README_zh.md")
    assert len(blocks("README.md")) >= 8
