"""Reward models, distillation, quantisation-aware training: losses by definition, results as written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForSequenceClassification, TrainingArguments

from xverse.cli import main
from xverse.finetune.distillation import DistillationTrainer, divergence
from xverse.finetune.encode import Example
from xverse.finetune.quantization_aware import Rounded, round_in_training
from xverse.finetune.reward_model import RewardTrainer
from xverse.finetune.settings import read_settings
from xverse.finetune.trainer import row_of
from xverse.formats import load_model, save_hf
from xverse.hf import XverseConfig, XverseForCausalLM, XverseForSequenceClassification
from xverse.kernels.linear import QuantLinear
from xverse.model import FullCausal
from xverse.model.transformer import XverseForCausalLM as PlainModel
from xverse.model.transformer import init_weights
from xverse.tokenizer import train_tokenizer
from xverse.train.plot import read_metrics

BASE = {"model_name_or_path": "x", "dataset": "x", "do_train": True, "output_dir": "out"}


def examples_of(vocabulary: int, lengths: tuple[int, ...], margins: bool = False) -> list[Example]:
    draw = torch.Generator().manual_seed(1)
    made = []
    for place, length in enumerate(lengths):
        ids = torch.randint(4, vocabulary, (length,), generator=draw).tolist()
        margin = 0.3 * (place // 2) if margins else 0.0
        made.append(Example(ids, [i > 3 for i in range(length)], f"x[{place}]", margin=margin))
    return made


def options_of(examples: list[Example], path: Path) -> dict[str, Any]:
    args = TrainingArguments(output_dir=str(path), use_cpu=True, report_to="none")
    return {"args": args, "examples": examples, "held_out": [], "row_length": None, "pad_id": 1}


@pytest.fixture
def pairs(folder: Path) -> Path:
    rows = [
        {
            "conversations": [{"from": "human", "value": f"say hello {i}"}],
            "chosen": {"from": "gpt", "value": "good morning"},
            "rejected": {"from": "gpt", "value": "go away " + "now " * (i % 3)},
            "margin": 0.1 * (i % 2),
        }
        for i in range(40)
    ]
    (folder / "pairs.json").write_text(json.dumps(rows))
    return folder


def test_the_reward_models_loss(tiny_config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = XverseConfig.from_model_config(tiny_config, num_labels=1)
    model = XverseForSequenceClassification(config).eval()
    examples = examples_of(tiny_config.vocab_size, (9, 12, 6, 15), margins=True)
    trainer = RewardTrainer(model=model, centring=0.05, **options_of(examples, tmp_path))
    losses, margin = trainer._losses(model, row_of(examples[:4], 1))
    scores = [model(input_ids=torch.tensor([e.ids])).logits[0, 0] for e in examples]  # transformers' pooling
    for pair in range(2):
        chosen, rejected = scores[2 * pair : 2 * pair + 2]
        assert margin[pair].item() == pytest.approx((chosen - rejected).item(), abs=1e-6)
        expected = -logsigmoid(chosen - rejected - 0.3 * pair) + 0.05 * (chosen + rejected) ** 2
        assert losses[pair].item() == pytest.approx(expected.item(), abs=1e-6)
    filler, _ = trainer._losses(model, row_of([], 1))
    assert filler.sum().item() == 0.0


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_reward_model_learns_and_rewards(
    pairs: Path, document, flags, tmp_path: Path, kind: str, capsys
) -> None:
    document |= {"stage": "rm", "dataset": "pairs.json", "finetuning_type": kind, "bf16": "false"}
    document |= {"learning_rate": "5e-3", "val_size": "8"}
    assert main(["finetune", *flags(document)]) == 0
    out = tmp_path / "out"
    assert json.loads((out / "all_results.json").read_text())["eval_accuracy"] == 1.0
    assert "Bradley-Terry" in (out / "README.md").read_text()
    if kind == "full":
        assert json.loads((out / "config.json").read_text())["architectures"] == [
            "XverseForSequenceClassification"
        ]
        model = AutoModelForSequenceClassification.from_pretrained(out)
        assert model.score.weight.shape == (1, 64)
    rows = [{"instruction": f"say hello {i}", "output": ""} for i in range(8)]
    (pairs / "asked.json").write_text(json.dumps(rows))
    keys = ("model_name_or_path", "do_train", "dataset_dir", "logging_steps")
    grpo = {
        **{key: document[key] for key in keys},
        "stage": "grpo",
        "dataset": "asked.json",
        "reward_funcs": str(out),
        "num_generations": "4",
        "max_completion_length": "6",
        "max_steps": "1",
        "output_dir": str(tmp_path / "grpo"),
    }
    assert main(["finetune", *flags(grpo)]) == 0
    assert read_metrics(tmp_path / "grpo" / "metrics.jsonl")[0]["reward_std"] > 0
    base, written = document["model_name_or_path"], str(tmp_path / "written")
    named = ["--model", str(out)] if kind == "full" else ["--model", base, "--adapter", str(out)]
    capsys.readouterr()
    for verb in (
        ["export", "--type", "bf16", "--format", "hf", "--out", written],
        ["chat", "--complete", "a"],
    ):
        assert main([verb[0], *named, *verb[1:]]) == 2, "it would write text without its head"
        assert "of a reward model" in (said := capsys.readouterr().err) or "is a reward model" in said
    if kind == "full":
        grpo |= {"reward_funcs": document["model_name_or_path"], "output_dir": str(tmp_path / "other")}
        assert main(["finetune", *flags(grpo)]) == 2  # a language model is not a reward model
    else:
        config = json.loads((out / "adapter_config.json").read_text())
        (out / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
        assert main(["finetune", *flags({**grpo, "output_dir": str(tmp_path / "other")})]) == 2


def reference_divergence(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    kl = lambda p, q: (p * (p.log() - q.log())).sum(-1)  # noqa: E731
    p, q = teacher.exp(), student.exp()
    if beta in (0, 1):
        return kl(p, q) if beta == 0 else kl(q, p)
    mixed = beta * p + (1 - beta) * q
    return beta * kl(p, mixed) + (1 - beta) * kl(q, mixed)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_distillation_is_its_formula(tiny_config: Any, tmp_path: Path, beta: float, monkeypatch: Any) -> None:
    monkeypatch.setattr("xverse.finetune.distillation.loss_chunk", lambda *_: 5)  # several parts
    torch.manual_seed(0)
    model = XverseForCausalLM(XverseConfig.from_model_config(tiny_config)).eval()
    teacher = PlainModel(tiny_config)
    init_weights(teacher, seed=3)
    examples = examples_of(tiny_config.vocab_size, (9, 12, 6))
    values = {**BASE, "teacher": "t", "distillation_beta": beta, "distillation_temperature": 2.0}
    settings = read_settings({**values, "distillation_weight": 0.7}, "test")
    trainer = DistillationTrainer(
        model=model, teacher=teacher, settings=settings, **options_of(examples, tmp_path)
    )
    batch = row_of(examples[:3], 1)
    found = trainer.batch_loss(model, batch, num_items_in_batch=batch["num_targets"])
    found.backward()
    gradient = model.lm_head.weight.grad.clone()
    exact, exact_teacher = model.double(), teacher.double()
    exact.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        ids, mask = torch.tensor([example.ids]), torch.tensor(example.mask[1:])
        own = exact(input_ids=ids).logits[0, :-1][mask]
        theirs = exact_teacher(ids, FullCausal(1, ids.shape[1])).detach()[0, :-1][mask]
        apart = reference_divergence((own / 2).log_softmax(-1), (theirs / 2).log_softmax(-1), beta)
        total = total + 0.7 * 4 * apart.sum() + 0.3 * cross_entropy(own, ids[0, 1:][mask], reduction="sum")
    (total / batch["num_targets"]).backward()
    assert found.item() == pytest.approx(total.item() / batch["num_targets"], abs=1e-6)
    torch.testing.assert_close(gradient.double(), exact.lm_head.weight.grad, rtol=1e-4, atol=1e-6)
    filler = trainer.batch_loss(model.float(), row_of([], 1), num_items_in_batch=7)
    assert filler.item() == 0.0
    same = torch.randn(4, 9).log_softmax(-1)
    assert divergence(same, same, beta).abs().max() < 1e-6


def test_a_student_learns_its_teachers_probabilities(
    document, flags, tmp_path, wide_config, tiny_tokenizer, tiny_texts, capsys
):
    for name, seed in (("teacher", 5), ("student", 6)):
        model = PlainModel(wide_config)
        init_weights(model, seed=seed)
        save_hf(model, tiny_tokenizer, tmp_path / name, torch.float32)
    document |= {"model_name_or_path": str(tmp_path / "student"), "teacher": str(tmp_path / "teacher")}
    document |= {
        "teacher_quantization_bit": "8",
        "learning_rate": "3e-3",
        "bf16": "false",
        "packing": "true",
        "cutoff_len": "64",
    }
    assert main(["finetune", *flags(document)]) == 0
    held_out = [r["valid"]["all"] for r in read_metrics(tmp_path / "out" / "metrics.jsonl") if "valid" in r]
    losses = [r["loss"] for r in read_metrics(tmp_path / "out" / "metrics.jsonl") if "loss" in r]
    assert losses[-1] < 0.8 * losses[0], (losses, held_out)
    other = train_tokenizer(tiny_texts, vocab_size=690, min_frequency=1)
    model = PlainModel(dataclasses.replace(wide_config, vocab_size=690))
    init_weights(model, seed=1)
    save_hf(model, other, tmp_path / "foreign", torch.float32)
    document |= {"teacher": str(tmp_path / "foreign"), "output_dir": str(tmp_path / "two")}
    capsys.readouterr()
    assert main(["finetune", *flags(document)]) == 2
    assert "teacher" in (line := capsys.readouterr().err.strip().splitlines()[-1])
    assert "tokenizer differs" in line


@pytest.mark.parametrize(("kind", "method"), [("int4", "full"), ("int8", "lora"), ("int4", "freeze")])
def test_what_is_written_is_what_was_trained(
    document, flags, tmp_path, wide_config, tiny_tokenizer, kind, method, monkeypatch
):
    """Equal bits of every weight and equal logits, through the trained model and the written directory."""
    model = PlainModel(wide_config)
    init_weights(model, seed=0)
    save_hf(model, tiny_tokenizer, tmp_path / "wide", torch.float32)
    trained: list[Any] = []
    from xverse.finetune import run

    write = run.write_rounded
    monkeypatch.setattr(
        run, "write_rounded", lambda model, *rest: (trained.append(model), write(model, *rest))
    )
    document |= {"model_name_or_path": str(tmp_path / "wide"), "quantization_aware": kind, "bf16": "false"}
    document |= {"finetuning_type": method, "learning_rate": "2e-3", "num_train_epochs": "1"}
    document |= {"evaluation_strategy": "no", "freeze_trainable_layers": "1"}
    document.pop("load_best_model_at_end")
    assert main(["finetune", *flags(document)]) == 0
    losses = [r["loss"] for r in read_metrics(tmp_path / "out" / "metrics.jsonl") if "loss" in r]
    assert losses[-1] < losses[0] - 0.2
    written = load_model(tmp_path / "out" / kind, torch.float32)
    trained[0].eval()
    base = trained[0].get_base_model() if method == "lora" else trained[0]
    count = 0
    for name, module in written.named_modules():
        if isinstance(module, QuantLinear):
            used = base.get_submodule(name)
            assert isinstance(used, Rounded)
            weight = used.straight_through().detach()
            assert torch.equal(module.dequantize(torch.float32), weight), name
            count += 1
    assert count == 7 * wide_config.num_hidden_layers
    plain = PlainModel(wide_config)
    for name, module in plain.named_modules():
        source = written.get_submodule(name)
        if isinstance(source, QuantLinear):
            module.weight = nn.Parameter(source.dequantize(torch.float32))
        elif module._parameters:
            module.weight = source.weight
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        ours = trained[0].eval()(input_ids=tokens, use_cache=False).logits
        assert (plain.eval()(tokens, FullCausal(1, 20)) - ours).abs().max() < 1e-5
    # The kernels of generation round activations, too.
    difference = (written.eval()(tokens, FullCausal(1, 20)) - ours).abs().max()
    assert difference < 0.05 * ours.abs().max()


def test_rounding_lets_gradients_through(wide_config: Any) -> None:
    torch.manual_seed(0)
    model = XverseForCausalLM(XverseConfig.from_model_config(wide_config))
    round_in_training(model, "int4")
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, wide_config.hidden_size)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand_as(layer.weight))
    assert len(layer.straight_through().detach()[0].unique()) <= 16 * wide_config.hidden_size // 128


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher": "t", "stage": "dpo"}, "teacher needs stage sft or pt"),
        ({"distillation_weight": 0.5}, "distillation_weight needs teacher"),
        ({"quantization_aware": "int4", "quantization_bit": 4}, "cannot be combined with quantization_bit"),
        ({"quantization_aware": "int4", "lora_dropout": 0.1}, "cannot be combined with lora_dropout"),
        ({"quantization_aware": "int4", "stage": "rm"}, "cannot be combined with stage rm"),
        ({"center_rewards_coefficient": 0.1}, "needs stage rm"),
        ({"quantization_bit": 4, "stage": "rm"}, "cannot be combined with stage rm"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_contradict_each_other(values: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        read_settings({**BASE, **values}, "test")
