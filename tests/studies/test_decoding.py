"""Speculation and scheduler figures, measured end to end on small models."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.studies import decoding
from xverse.bench import weights
from xverse.config import UserError
from xverse.formats import save_hf
from xverse.model import XverseForCausalLM, init_weights


@pytest.fixture
def model(wide_config: Any) -> XverseForCausalLM:
    return weights.random_model(replace(wide_config, vocab_size=700), torch.float32)


def test_forced_replies_are_said(model: Any) -> None:
    figures = decoding.speculation(model, weights.placeholder_tokenizer(700), "tiny", threads=1, rounds=1)
    assert figures["quoting"]["lookup_tok_s"] > 0
    assert figures["other"]["ratio"] > 0
    assert 0 < figures["accepted_tokens"] <= figures["proposed_tokens"]


def test_the_texts_quote_and_do_not() -> None:
    prompt, replies = decoding.texts(12288)
    joined = " ".join(map(str, prompt))
    quoted = replies["quoting"]
    assert len(quoted) == len(replies["other"]) == 96
    assert " ".join(map(str, quoted[1:25])) in joined
    assert " ".join(map(str, replies["other"][:6])) not in joined


@pytest.mark.thorough
def test_real_replies_are_the_same(tiny_model: Any, tiny_tokenizer: Any) -> None:
    draft = XverseForCausalLM(tiny_model.config)
    init_weights(draft, seed=3)
    pair = (draft.eval(), tiny_tokenizer)
    figures = decoding.acceptance(tiny_model, tiny_tokenizer, "tiny", pair, threads=1, rounds=1)
    for kind in ("plain", "lookup", "draft"):
        assert figures[kind]["same_replies"] == 8
    assert figures["plain"]["proposed_tokens"] == 0


def test_the_share_outside_the_model(tiny_model: Any, tiny_tokenizer: Any) -> None:
    figures = decoding.scheduler(tiny_model, tiny_tokenizer, "tiny", batch=4)
    for kind in ("greedy", "chat"):
        assert 0 < figures[kind]["outside_share"] < 1


@pytest.mark.thorough
def test_parts_on_the_command_line(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Any) -> None:
    save_hf(tiny_model, tiny_tokenizer, tmp_path / "model")
    path = str(tmp_path / "model")

    def run(*flags: str) -> dict[str, Any]:
        parser = argparse.ArgumentParser()
        decoding.arguments(parser)
        return decoding.run(parser.parse_args(flags))

    assert run("--model", path, "--draft", path)["draft"]["same_replies"] == 8
    for flags in (("--part", "scheduler", "--model", path), ("--shape", "nano")):
        with pytest.raises(UserError, match="--draft needs --part speculation and a --model"):
            run(*flags, "--draft", path)
