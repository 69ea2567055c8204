"""Bad steps are passed over, a bad stretch is undone, and a process that hangs says where."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xverse.data.feed import Batch, PretrainFeed
from xverse.model import XverseConfig, XverseForCausalLM, init_weights
from xverse.train import TrainConfig, fit
from xverse.train.plot import read_metrics
from xverse.train.survival import EXIT_HUNG, Steadiness, zscore

Shape = dict[str, int]


def config(**settings: object) -> TrainConfig:
    defaults = {"steps": 20, "batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 5, "dtype": "float32"}
    defaults["preflight"] = "off"
    return TrainConfig(**{**defaults, **settings})  # type: ignore[arg-type]


class Poisoned(XverseForCausalLM):
    """Its loss is not a number in some steps, counted from the start of the process."""

    def __init__(self, shape: Shape, bad: set[int], first: int = 0) -> None:
        super().__init__(XverseConfig(**shape))
        init_weights(self, seed=0)
        self.bad, self.count = bad, first

    def loss(self, *inputs: object, **options: object) -> torch.Tensor:
        self.count += 1
        total = super().loss(*inputs, **options)  # type: ignore[arg-type]
        return total * math.nan if self.count - 1 in self.bad else total


def run(feed: PretrainFeed, model: XverseForCausalLM, out: Path, settings: TrainConfig) -> list[dict]:
    fit(model, feed.batch, settings, out)
    return read_metrics(out / "metrics.jsonl")


def test_a_bad_step_changes_nothing(feed: PretrainFeed, tiny_shape: Shape, tmp_path: Path) -> None:
    records = run(feed, Poisoned(tiny_shape, {4, 9}), tmp_path, config())
    assert [r["step"] for r in records if "skipped" in r] == [4, 9]
    assert [r["step"] for r in records if "loss" in r] == [s for s in range(20) if s not in (4, 9)]
    assert not any("rollback" in r for r in records)


def test_rollback_takes_the_weights_of_the_last_checkpoint(
    feed: PretrainFeed, tiny_shape: Shape, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps 8 to 10 are bad: the rest equals a run from the weights after step 6 over the data from 11 on."""
    settings = config(checkpoint_every=6, keep_checkpoints=9)
    model = Poisoned(tiny_shape, {8, 9, 10})
    records = run(feed, model, tmp_path / "a", settings)
    assert [r["rollback"] for r in records if "rollback" in r] == [6]
    assert "3 in a row; rolled back to step-00000006, continuing with the data of step 12" in " ".join(
        capsys.readouterr().err.split()
    )
    expected = Poisoned(tiny_shape, {6, 7, 8, 9, 10})
    others = run(feed, expected, tmp_path / "b", config(checkpoint_every=0, rollback_after=9))
    losses = [[r["loss"] for r in some if "loss" in r and r["step"] > 10] for some in (records, others)]
    assert losses[0] == losses[1]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name])


def test_outliers_by_zscore() -> None:
    assert zscore(4.0, [1.0, 3.0]) == pytest.approx(2.0)
    steady = Steadiness(config(skip_zscore=5.0, skip_window=10))
    for i in range(10):
        assert not steady.judge(3.0 + 0.01 * (i % 2), 1.0 + 0.1 * (i % 2))
    assert "loss 3.100 is" in steady.judge(3.1, 1.0)
    assert "gradient norm 9.000 is" in steady.judge(3.0, 9.0)
    assert steady.bad == 2
    assert not steady.judge(2.0, 1.0), "better is no outlier"
    assert steady.bad == 0
    again = Steadiness(steady.config)
    again.restore(json.loads(json.dumps(steady.state())))
    assert again == steady


HANGING = """
import sys, time
from pathlib import Path
import torch
from xverse.data.feed import Batch
from xverse.model import XverseConfig, XverseForCausalLM, init_weights
from xverse.train import TrainConfig, fit
from xverse.train.parallel import world_of

shape = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
with world_of("ddp") as world:
    model = XverseForCausalLM(XverseConfig(**shape))
    init_weights(model, 0)
    def stuck_in_the_mud(first, stop):
        if first == 7:  # the second process's in the fourth step
            time.sleep(1000)
        tokens = torch.full((stop - first, 8), 5)
        return Batch(tokens, tokens, torch.zeros_like(tokens, dtype=torch.int32))
    config = TrainConfig(
        steps=9, batch_size=2, learning_rate=1e-3, parallel="ddp", hang_seconds=3, dtype="float32",
        preflight="off",
    )
    fit(model, stuck_in_the_mud, config, Path(sys.argv[1]), world=world)
"""


def test_a_hang_is_named_and_ends_the_run(torchrun: Callable[..., Any], tmp_path: Path) -> None:
    process = torchrun(2, str(tmp_path / "run"), script=HANGING)
    output, _ = process.communicate()
    assert process.returncode != 0
    assert "hung at step 4" in output
    assert "furthest behind: rank 1 (step 4, data); its stack:" in output
    assert f"exitcode  : {EXIT_HUNG}" in output
    beats = [json.loads((tmp_path / "run" / "heartbeats" / f"{r}.json").read_text()) for r in (0, 1)]
    assert "hung" in {beat["status"] for beat in beats}


def test_a_batch_without_targets_is_no_error(tiny_shape: Shape, tmp_path: Path) -> None:
    model = XverseForCausalLM(XverseConfig(**tiny_shape))
    init_weights(model, seed=0)
    tokens = torch.full((4, 8), 5)
    empty = Batch(tokens, torch.full_like(tokens, -100), torch.zeros_like(tokens, dtype=torch.int32))
    call: Callable[..., Batch] = lambda first, stop: empty  # noqa: E731
    fit(model, call, config(steps=2), tmp_path)
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r]
    assert [r["loss"] for r in records] == [0.0, 0.0]
