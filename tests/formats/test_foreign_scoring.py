"""Every other model scored as the evaluation scores it, against its plain reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from xverse.cli import main
from xverse.eval.backends import TransformersBackend

from .foreign_zoo import ZOO, random_tensors
from .test_foreign_models import make

FAMILIES = [name for name in ZOO if name != "internlm-dynamic"]


@pytest.mark.parametrize("name", FAMILIES)
def test_scores(name: str, tmp_path: Path, foreign_tokenizers: dict[str, Path]) -> None:
    """With the beginning shared and without, letters of one token and of two."""
    zoo, tensors = ZOO[name], random_tensors(ZOO[name])
    backend = TransformersBackend.load(str(make(name, tmp_path, foreign_tokenizers)), threads=1)
    beginning = list(range(20, 42))
    items = [
        ([*beginning, *range(70, 70 + extra)], [[5], [6], [7, 8]] if extra == 3 else [[5], [6]])
        for extra in (0, 1, 3, 7)
    ]
    for share in (True, False):
        backend.shares = share
        found = backend.score(items)
        assert backend.shares == share
        for (ids, continuations), scores in zip(items, found, strict=True):
            for continuation, value in zip(continuations, scores, strict=True):
                whole = torch.tensor([[*ids, *continuation]])
                logprobs = zoo.forward(tensors, zoo.config, whole, 0)[0].float().log_softmax(-1)
                expected = sum(
                    logprobs[len(ids) - 1 + n, token].item() for n, token in enumerate(continuation)
                )
                assert value == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", ["chatglm2", "falcon-old", "falcon"])
def test_the_command(
    name: str, tmp_path: Path, foreign_tokenizers: dict[str, Path], test_data: Path, capsys: Any
) -> None:
    directory = make(name, tmp_path, foreign_tokenizers)
    flags = [
        "--model",
        str(directory),
        "--data-dir",
        str(test_data / "eval"),
        "--tasks",
        "ceval",
        "--limit",
        "1",
    ]
    out = tmp_path / "out"
    assert main(["eval", "run", *flags, "--out", str(out), "--threads", "1", "--shots", "0"]) == 0
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert len(report["questions"]) == 52
    assert report["runs"][0]["settings"]["backend"] == "TransformersBackend"
    assert main(["eval", "run", *flags, "--out", str(tmp_path / "other"), "--quantize", "int4"]) == 2
    assert "scored with transformers" in capsys.readouterr().err
