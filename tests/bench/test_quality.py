"""``xverse bench quality``: the figures of our kinds and of llama.cpp's, bits per weight, wrong input."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from xverse.bench.quality import bits_per_weight
from xverse.cli import main
from xverse.formats import save_hf
from xverse.model import XverseForCausalLM, init_weights


@pytest.fixture(scope="module")
def source(wide_config: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = XverseForCausalLM(wide_config)
    init_weights(model, seed=0)
    path = tmp_path_factory.mktemp("source") / "model"
    save_hf(model, tiny_tokenizer, path, torch.bfloat16)
    return path


@pytest.fixture(autouse=True)
def short_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xverse.quant.text.CALIBRATION_TOKENS", 2048)
    monkeypatch.setattr("xverse.quant.tuning.STEPS", 2)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["bench", "quality", "--threads", "1", "--tokens", "512", *arguments]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_kinds_are_read_alike(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ["int4", "int8", "int4-loading", "bpw=5"]
    results = run(capsys, "--model", str(source), "--ours", *kinds)["results"]
    assert [result["name"] for result in results] == kinds
    int4, int8, loading, mixed = results
    assert int8["kl"] < mixed["kl"] < int4["kl"]
    assert int4["kl"] < loading["kl"] * 1.05
    assert 4.25 <= int4["bits_per_weight"] < 4.35  # norms in bfloat16 weigh more in a model this small
    assert 8.1 < int8["bits_per_weight"] < 8.3
    assert 4.8 < mixed["bits_per_weight"] <= 5.0
    assert all(result["embedding_bits"] == 16 for result in results)


def test_embedding_counts_apart() -> None:
    sizes = {"e": (200, 100), "h": (50, 100), "w": (50, 100)}
    assert bits_per_weight(sizes, "e", "h") == (4.0, 16.0)
    del sizes["h"]  # tied: it is the head
    assert bits_per_weight(sizes, "e", "h") == (10.0, None)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--ours", "int5"], "ours"),
        (["--ours", "bpw=x"], "expected bits per weight"),
        (["--texts", "nothing"], "write NAME=PATH"),
        (["--texts", "a=nowhere"], "nowhere: no such file or folder"),
        (["--work-dir", "nowhere"], "--work-dir has no effect without --peers"),
        (["--peers", "Q4_K_L"], "Q4_K_M"),
    ],
)
def test_mistakes_are_one_line(
    source: Path, arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "quality", "--model", str(source), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert part in error


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None, reason="llama-cpp-python is installed")
def test_peers_need_a_package(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "quality", "--model", str(source), "--peers"]) == 2
    assert "--peers needs llama_cpp, which is not installed; run: pip install" in capsys.readouterr().err


def test_peers_are_read_like_ours(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llama_cpp", reason='needs pip install "xverse-lm[bench]"')
    results = run(capsys, "--model", "nano", "--ours", "int8", "--peers", "Q8_0", "Q4_0")["results"]
    ours, eight, four, weighted = results
    assert [result["imatrix"] for result in results] == [False, False, False, True]
    assert 0.2 < ours["kl"] / eight["kl"] < 5
    assert eight["kl"] < weighted["kl"] < 1.1 * four["kl"]
    assert 8.5 <= eight["bits_per_weight"] < 8.6
