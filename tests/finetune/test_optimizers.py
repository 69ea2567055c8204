"""Optimizers beside transformers' own: which parameters learn how fast; and the order without shuffling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from xverse.config import UserError
from xverse.finetune.encode import Example
from xverse.finetune.launch import training_arguments
from xverse.finetune.methods import prepare
from xverse.finetune.optimizers import optimizer_maker
from xverse.finetune.settings import Settings, read_settings
from xverse.finetune.trainer import FILLER, FinetuneTrainer, Order, Rows
from xverse.hf import XverseConfig, XverseForCausalLM


def settings_of(**values: Any) -> Settings:
    base = {"model_name_or_path": "x", "output_dir": "y", "dataset": "d", "do_train": True}
    return read_settings({**base, **values}, "test")


def trainer_of(model: Any, settings: Settings, out: Path) -> FinetuneTrainer:
    args = TrainingArguments(
        output_dir=str(out), use_cpu=True, report_to="none", learning_rate=1e-3, max_steps=2,
        per_device_train_batch_size=2, logging_steps=1, save_strategy="no", weight_decay=0.1,
    )  # fmt: skip
    examples = [Example([4 + i, 5, 6, 7, 8], [False] + [True] * 4, f"e[{i}]") for i in range(4)]
    return FinetuneTrainer(
        model=model, args=args, examples=examples, held_out=[], row_length=None, pad_id=1,
        optimizer=optimizer_maker(settings, args),
    )  # fmt: skip


def test_loraplus_lets_the_second_matrices_learn_faster(tiny_config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = XverseForCausalLM(XverseConfig.from_model_config(tiny_config))
    settings = settings_of(loraplus_lr_ratio=16)
    trainer = trainer_of(prepare(model, settings), settings, tmp_path)
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {1e-3}
    assert [rate for name, rate in rates.items() if "lora_B" in name] == pytest.approx([16e-3] * 14)
    assert len(rates) == sum(parameter.requires_grad for parameter in trainer.model.parameters())
    trainer.train()


def test_muon_updates_matrices_by_orthogonal_steps(tiny_config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = XverseForCausalLM(XverseConfig.from_model_config(tiny_config))
    settings = settings_of(finetuning_type="full", use_muon=True)
    trainer = trainer_of(model, settings, tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.args.max_steps = 1
    trainer.args.lr_scheduler_type = "constant"
    trainer.train()
    for name, parameter in model.named_parameters():
        if ".layers." not in name or parameter.dim() != 2:
            continue
        rate = 1e-3
        step = (before[name] * (1 - rate * 0.1) - parameter.detach()) / (
            rate * 0.2 * max(parameter.shape) ** 0.5
        )
        values = torch.linalg.svdvals(step)
        assert 0.7 < values.max() < 1.4, name  # a gradient of few examples has few directions


def test_unshuffled_examples_keep_their_order() -> None:
    order = Order(5, 2, seed=3, shuffled=False)
    assert list(order) == [0, 1, 2, 3, 4, FILLER]
    order.set_epoch(1)
    assert list(order)[:5] == [0, 1, 2, 3, 4]
    assert list(Order(5, 2, seed=3))[:5] != [0, 1, 2, 3, 4]
    examples = [Example([4] * 10, [True] * 10, f"e[{i}]") for i in range(6)]
    rows = Rows(examples, 20, seed=3, shuffled=False)
    assert sorted(number for row in rows.rows for number in row) == list(range(6))


def problem(**values: Any) -> str:
    """What is wrong with settings, in one line; empty if nothing is."""
    try:
        training_arguments(settings_of(**values))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", [item.value for item in OptimizerNames])
def test_an_optimizer_can_be_made_or_its_package_is_named(name: str, tmp_path: Path) -> None:
    if text := problem(optim=name):
        assert "\n" not in text
        assert any(word in text for word in ("install", "failed to import")), text
    else:
        model = torch.nn.Linear(4, 4)
        args = TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True, report_to="none")
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        assert kind(model.parameters(), **options)


@pytest.mark.parametrize("name", INTEGRATION_TO_CALLBACK)
def test_a_tracker_is_there_or_its_package_is_named(name: str) -> None:
    text = problem(report_to=name)
    assert not text or (text.startswith(f"report_to {name}") and "\n" not in text)
