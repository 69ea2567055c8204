"""A step has one loss and one gradient, whatever its micro-batches, accumulation and packing (float32)."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from xverse.finetune.encode import Example
from xverse.finetune.preferences import PairTrainer
from xverse.finetune.reward_model import RewardTrainer
from xverse.finetune.settings import read_settings
from xverse.finetune.trainer import FinetuneTrainer
from xverse.hf import XverseConfig, XverseForCausalLM, XverseForSequenceClassification

COUNT = 10  # examples; with pairs five, which no batch of four or two divides


@pytest.fixture
def examples(tiny_config: Any) -> list[Example]:
    """Of unequal lengths, with one to many tokens with loss."""
    draw = torch.Generator().manual_seed(1)
    made = []
    for number in range(COUNT):
        length = 6 + 3 * (number % 5)
        ids = torch.randint(4, tiny_config.vocab_size, (length,), generator=draw).tolist()
        made.append(Example(ids, [i > 4 or i == 2 for i in range(length)], f"e[{number}]"))
    return made


def step_of(
    kind: str, config: Any, examples: list[Example], out: Path, batch: int, accumulation: int, packed: bool
):
    """The loss that is logged for a step over all examples, and the gradient's norm."""
    torch.manual_seed(0)
    shape = XverseConfig.from_model_config(config, num_labels=1)
    model: Any = (XverseForSequenceClassification if kind == "rm" else XverseForCausalLM)(shape)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.model.norm.weight.mul_(1.01)
    args = TrainingArguments(
        output_dir=str(out), use_cpu=True, report_to="none", per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, max_steps=1, logging_steps=1, save_strategy="no",
        learning_rate=1e-3, disable_tqdm=True,
    )  # fmt: skip
    options = {"args": args, "held_out": [], "pad_id": 1, "row_length": 40 if packed else None}
    options |= {"model": model, "examples": examples}
    if kind == "dpo":
        values = {"model_name_or_path": "nano", "output_dir": str(out), "dataset": "e", "do_train": True}
        settings = read_settings({**values, "stage": "dpo", "pref_ftx": 0.3}, "test")
        trainer: FinetuneTrainer = PairTrainer(reference=reference, settings=settings, **options)
    elif kind == "rm":
        options["examples"] = [dataclasses.replace(e, margin=0.1 * n) for n, e in enumerate(examples)]
        trainer = RewardTrainer(centring=0.1, **options)
    else:
        trainer = FinetuneTrainer(**options)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return logged["loss"], float(logged["grad_norm"])


@pytest.mark.parametrize(
    ("kind", "packed", "shapes"),
    [
        ("sft", False, [(4, 3), (1, 10)]),
        ("sft", True, [(1, 8), (3, 2)]),
        ("dpo", False, [(4, 2), (1, 5)]),
        ("rm", False, [(2, 3)]),
    ],
    ids=["sft", "packed", "dpo", "rm"],
)
def test_batches_do_not_change_a_step(tiny_config, examples, tmp_path, kind, packed, shapes) -> None:
    whole = COUNT if kind == "sft" else COUNT // 2
    expected = step_of(kind, tiny_config, examples, tmp_path, whole, 1, False)
    assert expected[0] > 0.1
    for batch, accumulation in shapes:
        loss, norm = step_of(kind, tiny_config, examples, tmp_path, batch, accumulation, packed)
        assert loss == pytest.approx(expected[0], abs=1e-6), (batch, accumulation)
        assert norm == pytest.approx(expected[1], rel=1e-5), (batch, accumulation)
