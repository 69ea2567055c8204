"""The quality benchmark: outlier channels preserve the model's function; texts are read as specified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.studies import quality
from xverse.config import UserError
from xverse.formats import save_hf
from xverse.model import FullCausal, XverseForCausalLM


def test_outlier_channels_change_no_answer(tiny_model: XverseForCausalLM) -> None:
    changed = quality.inject(tiny_model.state_dict(), tiny_model.config)
    tokens = torch.arange(40).view(2, 20)
    before = tiny_model(tokens, FullCausal(2, 20))
    norms = [name for name in changed if "norm" in name]
    assert all((changed[name] != tiny_model.state_dict()[name]).sum() == 1 for name in norms)
    tiny_model.load_state_dict(changed)
    torch.testing.assert_close(tiny_model(tokens, FullCausal(2, 20)), before)


def test_parts_give_equally_much_and_the_next_text_when_named_again(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.jsonl"
    first.write_text("".join(f"number {n}, " for n in range(2000)))
    second.write_text(json.dumps({"text": "a b c " * 2000}) + "\n")
    rows = quality.read_rows(tiny_tokenizer, f"{first},{second},{first}", 3 * 256)
    ids = tiny_tokenizer.encode(first.read_text())
    assert rows.shape == (3, 256)
    assert rows[0].tolist() == ids[:256]
    assert rows[2].tolist() == ids[256:512]
    assert quality.read_rows(tiny_tokenizer, str(tmp_path), 1024).shape == (4, 256)
    with pytest.raises(UserError, match="no such file or folder"):
        quality.read_rows(tiny_tokenizer, f"{first},{tmp_path / 'none'}", 1024)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(UserError, match="no part has 256 tokens"):
        quality.read_rows(tiny_tokenizer, str(tmp_path / "short.txt"), 1024)


def test_every_method_is_measured_and_judged(
    tmp_path: Path, tiny_model: XverseForCausalLM, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    save_hf(tiny_model, tiny_tokenizer, tmp_path / "model")
    (tmp_path / "text.txt").write_text("The mill stands still, the river does not. " * 200)
    text = str(tmp_path / "text.txt")
    result = quality.measure(
        str(tmp_path / "model"), [f"mill={text}"], text, tokens=512, threads=1, bits=(4,), group_size=32
    )
    assert [(each["method"], each["outliers"]) for each in result["results"]] == [
        (method, outliers) for outliers in (False, True) for method in ("rtn-row", "rtn", "gptq")
    ]
    assert all(each["kl"] > 0 for each in result["results"])
    json.dumps(result, allow_nan=False)
    table = capsys.readouterr().out
    assert "int4 gptq, outlier channels, mill" in table
    assert "of rtn-row's" in table
    with pytest.raises(UserError, match="NAME=PATH"):
        quality.measure(str(tmp_path / "model"), [text])
