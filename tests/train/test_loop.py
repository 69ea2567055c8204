"""The loop against plain references, in float32 on tiny models."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from xverse.config import UserError
from xverse.data.feed import Batch, PretrainFeed
from xverse.formats.write import llama_config
from xverse.model import IGNORE, XverseConfig, XverseForCausalLM, init_weights
from xverse.train import TrainConfig
from xverse.train.checkpoint import kept
from xverse.train.loop import train_step
from xverse.train.optimizer import learning_rate, make_adamw
from xverse.train.plot import read_metrics
from xverse.train.validate import bits_per_byte

Fit = Callable[..., XverseForCausalLM]


def steps_of(out: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(out / "metrics.jsonl") if "loss" in record]


def tiny(shape: dict[str, int]) -> XverseForCausalLM:
    model = XverseForCausalLM(XverseConfig(**shape))
    init_weights(model, seed=0)
    return model


def test_micro_batches_change_nothing_but_rounding(feed: PretrainFeed, tiny_shape: dict[str, int]) -> None:
    batch = feed.batch(0, 4)
    batch.targets[1, 5:] = IGNORE  # rows of unlike counts: a mean of the rows' means would be another loss
    results = {}
    for micro in (1, 2, 4, 0):
        model = tiny(tiny_shape)
        config = TrainConfig(
            steps=1, batch_size=4, learning_rate=1.0, micro_batch_size=micro, dtype="float32", grad_clip=0.5
        )
        loss, norm = train_step(model, batch, config)
        results[micro] = loss, norm, [parameter.grad for parameter in model.parameters()]
    whole = results.pop(4)
    assert whole[1] > 0.5, "clipping is part of it"
    for loss, norm, gradients in results.values():
        assert loss == pytest.approx(whole[0], rel=1e-5)
        assert norm == pytest.approx(whole[1], rel=1e-5)
        torch.testing.assert_close(gradients, whole[2], rtol=1e-4, atol=1e-7)


def llama_loss(llama: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean over the batch's targets, each document through Llama alone."""
    total = torch.zeros(())
    for tokens, targets, ids in zip(batch.tokens, batch.targets, batch.document_ids, strict=True):
        for number in ids.unique():
            logits = llama(tokens[ids == number][None]).logits[0]
            total = total + torch.nn.functional.cross_entropy(
                logits, targets[ids == number], ignore_index=IGNORE, reduction="sum"
            )
    return total / (batch.targets != IGNORE).sum()


def test_ten_steps_equal_a_plain_loop_over_llama(
    feed: PretrainFeed, tiny_shape: dict[str, int], fit_tiny: Fit, tmp_path: Path
) -> None:
    steps, warmup, peak, decay = 10, 3, 5e-3, 0.1
    ours = fit_tiny(tmp_path, steps=steps, warmup_steps=warmup, learning_rate=peak, micro_batch_size=2)
    start = tiny(tiny_shape)
    llama = LlamaForCausalLM(LlamaConfig(**llama_config(start.config, torch.float32)))
    llama.load_state_dict(start.state_dict())
    plain = [p for name, p in llama.named_parameters() if "norm" in name or "embed" in name]
    decayed = [p for name, p in llama.named_parameters() if not ("norm" in name or "embed" in name)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        foreach=False,
        fused=False,
    )
    records = steps_of(tmp_path)
    assert len(records) == steps
    for step, record in enumerate(records):
        angle = math.pi * (step - warmup) / (steps - 1 - warmup)
        rate = peak * (step + 1) / warmup if step < warmup else peak * (0.1 + 0.9 * (1 + math.cos(angle)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = llama_loss(llama, feed.batch(4 * step, 4 * step + 4))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-4)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert record["lr"] == pytest.approx(rate)
    assert records[-1]["loss"] < records[0]["loss"] - 0.1, "it learns"
    expected = llama.state_dict()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-3, rtol=0)


def test_a_growing_batch_reads_the_sequences_in_order(
    feed: PretrainFeed, fit_tiny: Fit, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    plain = feed.batch
    feed.batch = lambda first, stop: (seen.append((first, stop)), plain(first, stop))[1]  # type: ignore
    ramp = {"batch_ramp_start": 1, "batch_ramp_steps": 6, "micro_batch_size": 2}
    fit_tiny(tmp_path / "whole", steps=8, **ramp)
    assert seen == [(0, 1), (1, 2), (2, 4), (4, 6), (6, 9), (9, 12), (12, 16), (16, 20)]
    tokens = [
        round(r["tokens_per_second"] * r["seconds"] / feed.length) for r in steps_of(tmp_path / "whole")
    ]
    assert tokens == [1, 1, 2, 2, 3, 3, 4, 4]
    seen.clear()
    with pytest.raises(UserError, match="batch_ramp_steps = 6, not 5"):
        fit_tiny(tmp_path / "whole", steps=8, **{**ramp, "batch_ramp_steps": 5})
    fit_tiny(tmp_path / "whole", steps=8, **ramp)
    assert not seen, "finished"


def test_bfloat16_stays_close_to_float32(fit_tiny: Fit, tmp_path: Path) -> None:
    fit_tiny(tmp_path / "float32", steps=10)
    model = fit_tiny(tmp_path / "bfloat16", steps=10, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for exact, rounded in zip(steps_of(tmp_path / "float32"), steps_of(tmp_path / "bfloat16"), strict=True):
        assert rounded["loss"] == pytest.approx(exact["loss"], abs=0.02)


def test_schedule() -> None:
    def at(step: int, warmup: int = 10) -> float:
        config = TrainConfig(steps=101, batch_size=1, learning_rate=2.0, warmup_steps=warmup)
        return learning_rate(step, config)

    assert at(0) == pytest.approx(0.2)
    assert at(9) == at(10) == 2.0
    assert at(55) == pytest.approx(1.1)  # half-way between peak and end
    assert at(100) == pytest.approx(0.2)
    rates = [at(step) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)
    assert at(0, warmup=0) == 2.0
    assert at(100, warmup=500) == pytest.approx(2.0 * 101 / 500)  # a run that ends in its warm-up


def test_norms_and_embedding_are_not_decayed(tiny_shape: dict[str, int]) -> None:
    model = tiny(tiny_shape)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = make_adamw(model, weight_decay=0.1, betas=(0.9, 0.95)).param_groups
    decayed, plain = ([names[parameter] for parameter in group["params"]] for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {name.rpartition("layers.")[2].lstrip("01.") for name in plain} == {
        "model.embed_tokens.weight",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "model.norm.weight",
    }
    assert "lm_head.weight" in decayed
    assert len(decayed) == 2 * 7 + 1
    assert len(decayed) + len(plain) == len(names)


def test_divergence_stops_with_one_clear_line(fit_tiny: Fit, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"step \d+: loss .*nan.*: the run diverged; start again in"
    ) as caught:
        fit_tiny(tmp_path, steps=50, learning_rate=1e30, grad_clip=0.0, checkpoint_every=1)
    assert "\n" not in str(caught.value)
    last = kept(tmp_path).all()[-1]
    assert int(last.name[5:]) == len(steps_of(tmp_path)), "the steps that diverged left nothing"
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert sum("rollback" in record for record in records) == 3


def test_validation_changes_no_loss(fit_tiny: Fit, feed: PretrainFeed, tmp_path: Path) -> None:
    def validate(model: XverseForCausalLM) -> dict[str, float]:
        return bits_per_byte(model, feed, batch_size=2, max_tokens=100, dtype="float32")

    without = fit_tiny(tmp_path / "without", steps=9)
    validated = fit_tiny(tmp_path / "with", steps=9, validate=validate, validate_every=2)
    keys = ("step", "loss", "grad_norm", "lr")
    a, b = ([[r[key] for key in keys] for r in steps_of(tmp_path / name)] for name in ("without", "with"))
    assert a == b
    for name, tensor in without.state_dict().items():
        assert torch.equal(tensor, validated.state_dict()[name])
    records = read_metrics(tmp_path / "with" / "metrics.jsonl")
    valid = [record for record in records if "valid" in record]
    assert [record["step"] for record in valid] == [1, 3, 5, 7, 8]
    assert set(valid[-1]["valid"]) == {"all", "en", "zh"}


def test_progress_without_a_terminal(
    fit_tiny: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_tiny(tmp_path, steps=10, log_every=4)
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    pattern = (
        r"step (\d+)/10 · loss \d+\.\d{3} · [\d,]+ tok/s · \S+ TFLOP/s a device · goodput \d+ % · "
        r"data \d+\.\d % · \d+\.\d min left"
    )
    assert [re.fullmatch(pattern, line)[1] for line in lines] == ["4", "8", "10"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("steps", 0, "steps must be positive"),
        ("learning_rate", math.nan, "learning_rate must be positive"),
        ("learning_rate", math.inf, "learning_rate must be positive"),
        ("batch_size", -4, "batch_size must be positive"),
        ("micro_batch_size", -2, "micro_batch_size must not be negative"),
        ("micro_batch_size", 3, "batch_size 4 is not a multiple of micro_batch_size 3"),
        ("warmup_steps", -1, "warmup_steps must not be negative"),
        ("grad_clip", -1.0, "grad_clip must not be negative"),
        ("weight_decay", -0.1, "weight_decay must not be negative"),
        ("beta2", 1.0, "beta2 must be at least 0 and below 1"),
        ("checkpoint_every", -1, "checkpoint_every must not be negative"),
    ],
)
def test_impossible_settings_are_named(name: str, value: float, said: str) -> None:
    settings: dict[str, Any] = {"steps": 1, "batch_size": 4, "learning_rate": 1e-3, name: value}
    with pytest.raises(ValueError, match=re.escape(said)):
        TrainConfig(**settings)
