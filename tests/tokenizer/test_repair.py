"""Upstream's tokenizer.json, refused by current libraries, works after the repair."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from xverse.config import UserError
from xverse.tokenizer import Tokenizer, repair_file, repair_json

METASPACE = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": False}


@pytest.fixture(params=["plain", "nested"])
def broken(request: pytest.FixtureRequest, tiny_tokenizer: Tokenizer) -> dict[str, Any]:
    """The tiny tokenizer as upstream writes: Metaspace without prepend_scheme, alone or in a Sequence."""
    values = copy.deepcopy(tiny_tokenizer.values)
    digits = {"type": "Digits", "individual_digits": True}
    values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [METASPACE, digits]}
    values["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, METASPACE]}
    if request.param == "plain":
        values["pre_tokenizer"] = values["decoder"] = METASPACE
    return values


def test_refused_before_and_working_after(broken: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"prepend_scheme|untagged enum"):
        tokenizers.Tokenizer.from_str(json.dumps(broken))
    before = copy.deepcopy(broken)
    repaired = repair_json(broken)
    assert broken == before  # the argument is left alone
    backend = tokenizers.Tokenizer.from_str(json.dumps(repaired))
    text = "Hello  world"
    assert backend.encode(text).tokens[0][0] == "H"  # no ▁ before the first word
    assert backend.decode(backend.encode(text).ids) == text
    assert repair_json(repaired) == repaired


def test_load_repairs_in_memory(broken: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(broken), encoding="utf-8")
    before = path.read_bytes()
    tokenizer = Tokenizer.load(tmp_path)
    for text in ("def f():\n    return 1", "你好，世界", "a ▁ b", " x"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert path.read_bytes() == before
    tokenizer.save(tmp_path / "saved")
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert auto("Hello  world 12")["input_ids"] == tokenizer.encode("Hello  world 12")


def test_prefix_space_that_is_wanted_stays() -> None:
    values = {"pre_tokenizer": {**METASPACE, "add_prefix_space": True}, "decoder": None, "model": {}}
    assert repair_json(values) == values


def test_repair_file_and_directory(broken: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "tokenizer.json").write_text(json.dumps(broken), encoding="utf-8")
    (source / "config.json").write_text("{}", encoding="utf-8")
    assert repair_file(source / "tokenizer.json", tmp_path / "one.json") is True
    tokenizers.Tokenizer.from_file(str(tmp_path / "one.json"))
    assert repair_file(source, tmp_path / "copy") is True
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {"tokenizer.json", "config.json"}
    assert repair_file(source, source) is True  # in place
    tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    assert repair_file(source, source) is False
    with pytest.raises(UserError, match="not empty"):
        repair_file(source, tmp_path / "copy")
    with pytest.raises(UserError, match="is a file"):
        repair_file(source, tmp_path / "one.json")
    with pytest.raises(UserError, match="no such file"):
        repair_file(tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()
