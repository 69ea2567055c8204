"""What is reported with every figure, and the flags of ``xverse bench``."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import xverse
from xverse import hardware
from xverse.bench import report
from xverse.cli import main
from xverse.commands import bench
from xverse.config import UserError

ROOT = Path(__file__).resolve().parents[2]


def last_object(text: str) -> dict[str, Any]:
    figures = json.loads(text.splitlines()[-1])
    assert isinstance(figures, dict)
    return figures


def test_environment(capsys: pytest.CaptureFixture[str]) -> None:
    report.show("title", [report.Row("[red]figure[/red]", "1.0 GB/s", report.at_least(2, 1.0, "GB/s"))])
    report.finish({"bench": "x", "figure": 1.0})
    out = capsys.readouterr().out
    assert "[red]figure[/red]" in out
    assert "target ≥ 2 GB/s: missed" in out
    figures = last_object(out)
    assert figures["figure"] == 1.0
    assert figures["version"] == xverse.__version__
    assert figures["hardware"]["cores"] == hardware.cores().usable
    assert figures["versions"]["torch"]


def test_commit() -> None:
    if not (ROOT / ".git").exists():
        assert report.commit() == xverse.__version__
        return
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert report.commit().removesuffix("-dirty") == head.stdout.strip()


def test_no_room() -> None:
    with pytest.raises(UserError, match=r"needs 1000000000.0 GB of memory, .* GB are available"):
        report.need_memory(1e18)


def test_all_goes_on_without_room(capsys: pytest.CaptureFixture[str]) -> None:
    def none() -> dict[str, Any]:
        raise UserError("needs 15 GB of disk, 1 GB are free")

    figures = bench.run_all({"load": none, "infer": lambda: {"bench": "infer", "decode_tok_s": 1.0}})
    report.finish(figures)
    out = capsys.readouterr().out
    assert "not measured: needs 15 GB of disk" in out
    assert last_object(out)["results"] == {
        "load": {"bench": "load", "not_measured": "needs 15 GB of disk, 1 GB are free"},
        "infer": {"bench": "infer", "decode_tok_s": 1.0},
    }
    assert set(bench.BENCHMARKS) - set(bench.ALL) == {"quality", "serve"}
    assert all(callable(bench._with_defaults(name)) for name in bench.ALL)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["infr"], "unknown choice 'infr'; did you mean 'infer'?"),
        (["infer", "--prompt-token", "3"], "did you mean '--prompt-tokens'?"),
        (["infer", "--batch", "0"], "argument --batch: 0 is out of range"),
        (["infer", "--shape", "nno"], "unknown shape 'nno'; did you mean 'nano'?"),
        (["infer", "--shape", "nano", "--model", "x"], "not allowed with"),
        (["infer", "--shape", "nano", "--threads", "2000"], "threads: 2000 is out of range"),
        (["infer", "--shape", "nano", "--prompt-tokens", "9000"], "need 9130 positions, the model has 8192"),
        (["infer", "--model", "./nowhere"], "no model './nowhere'"),
        (["train", "--shape", "mimi"], "did you mean 'mini'?"),
        (["train", "--steps", "2"], "steps: 2 are too few"),
        (["train", "--sequence-length", "10000"], "sequence_length: 10000 is out of range (2 to 8192)"),
        (["soak", "--minutes", "5"], "unknown choice 'soak'"),
        (["decoding"], "in a checkout, python -m benchmarks has more)"),
        (["quant", "--part", "memory"], "unknown argument '--part'"),
    ],
)
def test_mistakes(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["bench", *arguments])
    except SystemExit as stopped:  # argparse's own errors
        code = stopped.code if isinstance(stopped.code, int) else -1
    output = capsys.readouterr()
    assert code == 2
    assert output.out == ""
    mistakes = [line for line in output.err.splitlines() if line.startswith("xverse")]
    assert len(mistakes) == 1
    assert expected in mistakes[0]
