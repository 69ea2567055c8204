"""Replayed text: shares by language, each token once, and the bits per byte that show what is forgotten."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.shards import write_shard
from xverse.cli import main
from xverse.config import UserError
from xverse.finetune.encode import Data, Example
from xverse.finetune.replay import _Text, add_replay, forgotten, report
from xverse.finetune.settings import Settings, read_settings
from xverse.hf import XverseForCausalLM


def settings_of(replay: dict[str, Any]) -> Settings:
    values = {"model_name_or_path": "x", "output_dir": "y", "dataset": "d", "do_train": True}
    return read_settings({**values, "replay": replay}, "test")


@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=8), min_size=1, max_size=3), st.integers(2, 16)
)
def test_the_windows_hold_each_token_once_and_no_two_documents(pieces: list[list[int]], length: int) -> None:
    text, number, documents = _Text(), 0, []
    for lengths in pieces:
        offsets = np.cumsum([0, *lengths])
        documents += [range(number + a, number + b) for a, b in itertools.pairwise(offsets)]
        text.pieces.append((np.arange(number, number + offsets[-1], dtype=np.uint32), offsets))
        number += int(offsets[-1])
    examples = list(text.examples("x", length, 0))
    seen = Counter(token for example in examples for token in example.ids)
    assert set(seen.values()) <= {1}
    for example in examples:
        assert 2 <= len(example.ids) <= length
        assert example.ids == list(range(example.ids[0], example.ids[0] + len(example.ids)))
        assert any(example.ids[0] in d and example.ids[-1] in d for d in documents)
    for document in documents:  # only single tokens, which have no loss, are left out
        assert len([t for t in document if t not in seen]) <= len(document) // length + 2


def test_languages_have_equal_shares_and_small_ones_give_all(tmp_path: Path, tiny_tokenizer: Any) -> None:
    text = "the quick brown fox jumps over the lazy dog "
    rows = [{"text": text * 4, "lang": "en"} for _ in range(60)] + [
        {"text": text, "lang": "de"} for _ in range(3)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "fr.txt").write_text("\n".join([text * 4] * 60))
    data = Data(train=[Example([1] * 50, [True] * 50, "d[0]") for _ in range(40)])
    replay = {"data": str(tmp_path), "share": 0.25, "eval_tokens": 30}
    add_replay(data, settings_of(replay), tiny_tokenizer, 64)
    tokens = Counter()
    for example in data.train[40:]:
        tokens[example.dataset] += len(example.ids)
    assert tokens.total() == pytest.approx(2000 / 3, abs=64)
    assert abs(tokens["replay/en"] - tokens["replay/fr"]) <= 64
    assert 0 < tokens["replay/de"] < tokens["replay/en"]
    assert {example.dataset for example in data.languages} == {"replay/de", "replay/en", "replay/fr"}
    held_out = {example.name for example in data.languages}
    assert not held_out & {example.name for example in data.train}
    assert "3 languages, 25" in data.notes[-1]
    repeated = Data(train=data.train[:40])
    add_replay(repeated, settings_of(replay), tiny_tokenizer, 64)
    assert repeated.train == data.train
    more = Data(train=data.train[:40])
    add_replay(more, settings_of({**replay, "share": 0.9}), tiny_tokenizer, 64)
    assert "there is no more text" in more.notes[-1]


def test_shards_of_another_tokenizer_and_wrong_values_are_refused(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    for tokenizer in (tiny_tokenizer.hash, "other"):
        write_shard(tmp_path / "train" / "zh", range(4, 40), [20, 16], tokenizer)
        data = Data(train=[Example([1] * 50, [True] * 50, "d[0]")])
        if tokenizer != "other":
            add_replay(
                data, settings_of({"data": str(tmp_path), "share": 0.3, "eval_tokens": 0}), tiny_tokenizer, 8
            )
            assert {example.dataset for example in data.train[1:]} == {"replay/zh"}
            continue
        with pytest.raises(UserError, match="another tokenizer"):
            add_replay(data, settings_of({"data": str(tmp_path), "share": 0.3}), tiny_tokenizer, 8)
    for values, message in (
        ({"data": "x", "share": 1}, "below 1"),
        ({"data": "x"}, "missing key 'share'"),
        ({"data": "x", "share": 0.1, "shares": 2}, "did you mean"),
    ):
        with pytest.raises(UserError, match=message):
            settings_of(values)
    with pytest.raises(UserError, match="no such file"):
        add_replay(Data(), settings_of({"data": str(tmp_path / "no"), "share": 0.1}), tiny_tokenizer, 8)


def test_languages_that_rise_by_more_than_a_tenth_are_named(capsys: Any) -> None:
    before, after = {"ar": 2.0, "en": 1.0, "th": 1.5}, {"ar": 2.21, "en": 1.09, "th": 3.0}
    assert list(forgotten(before, after)) == ["th", "ar"]
    report(before, after)
    text = capsys.readouterr().err
    assert "en 1.000 → 1.090" in text
    assert "th (+100%), ar (+10%)" in text


def test_a_run_replays_and_compares(document, flags, tmp_path: Path, tiny_tokenizer: Any) -> None:
    """The figures before training are those that a plain forward pass of the base gives."""
    lines = ["one morning the fox said hello to the lazy dog"] * 12
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "en.txt").write_text("\n".join(lines))
    document |= {"num_train_epochs": "1", "bf16": "false", "learning_rate": "1e-2"}
    words = [*flags(document), "--replay", f"data={tmp_path / 'texts'}", "share=0.2", "eval_tokens=20"]
    assert main(["finetune", *words]) == 0
    figures = json.loads((tmp_path / "out" / "languages.json").read_text())
    model = XverseForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    ids = [*tiny_tokenizer.encode(lines[0]), tiny_tokenizer.eos_id]
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    nats = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
    size = len(b"".join(tiny_tokenizer.token_bytes(i) for i in ids[1:-1]))
    assert figures["before"]["en"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert figures["after"]["en"] < figures["before"]["en"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| en | {figures['before']['en']:.3f} | {figures['after']['en']:.3f} |" in card
    assert "replay:" in card
