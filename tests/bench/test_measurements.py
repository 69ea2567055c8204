"""Every measurement runs end to end on a tiny shape and counts what it claims to count."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.studies import startup
from xverse.bench import infer_speed, train, weights
from xverse.bench.report import finish
from xverse.config import UserError
from xverse.formats import save_hf
from xverse.formats.quantize import quick_settings, stored_bytes
from xverse.model import FullCausal, XverseConfig, XverseForCausalLM, named_shape

TINY = XverseConfig(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=128,
)


def printed(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The object on the last line, which contains ``result`` and where it was measured."""
    finish(result)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"commit", "version", "versions", "hardware"} <= figures.keys()
    assert result.items() <= figures.items()
    return figures


def test_startup(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    save_hf(tiny_model, tiny_tokenizer, tmp_path / "model", generation_config={"max_new_tokens": 4})
    figures = printed(startup.measure(help_runs=2, chat_runs=1, model=str(tmp_path / "model")), capsys)
    assert 0 < figures["help_s"] < figures["chat_s"]
    assert len(figures["help_runs_s"]) == 2
    assert len(figures["chat_runs_s"]) == 1


def test_startup_without_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = startup.measure(help_runs=1, model=str(tmp_path / "none"))
    assert figures["chat_s"] is None
    assert figures["chat_not_measured"].startswith("no model ")
    assert "not measured: no model" in " ".join(capsys.readouterr().out.split())


def test_startup_says_what_failed() -> None:
    with pytest.raises(UserError, match="xverse hepl failed: xverse: unknown verb 'hepl'"):
        startup.wall_times(["hepl"], 1)


def test_infer(capsys: pytest.CaptureFixture[str]) -> None:
    model = weights.random_model(TINY, torch.bfloat16)
    tokenizer = weights.placeholder_tokenizer(TINY.vocab_size)
    before = torch.get_num_threads()
    result = infer_speed.measure(model, tokenizer, "tiny", prompt_tokens=20, new_tokens=6, batch=3, threads=1)
    assert torch.get_num_threads() == before
    figures = printed(result, capsys)
    assert (figures["batch"], figures["context"], figures["dtype"]) == (3, 26, "bfloat16")
    assert figures["weights_gb"] == pytest.approx(2 * TINY.num_parameters() / 1e9, abs=5e-5)
    assert len(figures["decode_runs_tok_s"]) == figures["rounds"] == 3
    assert len(figures["device_read_samples_gb_s"]) == 4
    for name in ("decode_tok_s", "prefill_tok_s", "read_gb_s", "device_read_gb_s", "read_share"):
        assert figures[name] > 0
    if sys.platform == "linux":
        assert 0.01 < figures["rss_gb"] < 8


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_infer_of_quantised_weights(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(TINY, hidden_size=128, intermediate_size=256)
    model = weights.random_model(config, torch.bfloat16, kind)
    tokenizer = weights.placeholder_tokenizer(config.vocab_size)
    result = infer_speed.measure(
        model, tokenizer, "tiny", prompt_tokens=20, new_tokens=6, threads=1, rounds=1
    )
    figures = printed(result, capsys)
    assert (figures["weights"], figures["dtype"]) == (kind, "bfloat16")
    expected = stored_bytes(config, quick_settings(kind, config)) / 1e9
    assert figures["weights_gb"] == pytest.approx(expected, abs=1e-4)
    assert figures["decode_tok_s"] > 0


def test_infer_counts_what_a_step_reads() -> None:
    """All weights, of the embedding one row per request, and the keys and values of all key-value heads."""
    for heads in (2, 1):
        config = replace(TINY, num_key_value_heads=heads)
        with torch.device("meta"):
            model = XverseForCausalLM(config).bfloat16()
        table = TINY.vocab_size * TINY.hidden_size
        weights = 2 * (config.num_parameters() - table + 2 * TINY.hidden_size)
        kv = 2 * 2 * TINY.num_hidden_layers * heads * 16  # keys and values, 2 bytes each
        assert infer_speed._step_bytes(model, batch=2, positions=10) == weights + 10 * kv


def test_infer_context() -> None:
    with pytest.raises(UserError, match="100 prompt and 60 new tokens at batch 1 need 162 positions"):
        infer_speed.check_context(TINY, 100, 60, 1)


def test_random_weights_work() -> None:
    model = weights.random_model(TINY, torch.float32)
    logits = model(torch.arange(4, 12)[None], FullCausal(1, 8))  # [1, 8, V]
    assert logits.isfinite().all()
    assert logits.std() > 0
    assert sum(p.numel() for p in model.parameters()) == TINY.num_parameters()


@pytest.mark.thorough
def test_train(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The two sides begin with equal weights; their losses agree at each step, and fall."""
    losses: dict[str, list[float]] = {}
    start = train._side

    @contextlib.contextmanager
    def listened(job: dict[str, Any]) -> Iterator[Callable[[int], dict[str, Any]]]:
        with start(job) as take:

            def noted(steps: int) -> dict[str, Any]:
                answer = take(steps)
                losses.setdefault(job["side"], []).append(answer["loss"])
                return answer

            yield noted

    monkeypatch.setattr(train, "_side", listened)
    result = train.measure(TINY, "tiny", batch_size=2, sequence_length=16, steps=4, threads=1)
    assert losses["xverse"] == pytest.approx(losses["transformers"], abs=1e-2)
    assert losses["xverse"][-1] < losses["xverse"][0]
    figures = printed(result, capsys)
    assert figures["first_loss"]["xverse"] == pytest.approx(figures["first_loss"]["transformers"], abs=1e-2)
    assert len(figures["ratios"]) == 4
    assert (figures["steps"], figures["block_steps"]) == (4, 1)
    for side in train.SIDES:
        if sys.platform == "linux":
            assert 0.05 < figures[side]["peak_rss_gb"] < 4
        assert figures[side]["tokens_s"] > 0
        assert figures[side]["tflops"]["causal"] < figures[side]["tflops"]["full"]
        assert figures[side]["matmul_share"]["full"] > 0


def test_train_flops() -> None:
    """mini at 512: 6 · (38,281,728 − 12,288 · 512) + 12 · 8 · 512 · 512."""
    assert named_shape("mini").flops_per_token(512) == {
        "full": 191_941_632 + 25_165_824,
        "causal": 191_941_632 + 12_582_912,
    }
