"""DPO: the loss by its definition, and a margin that grows on pairs it has not seen."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import TrainingArguments

from xverse.cli import main
from xverse.finetune.encode import Example, load_data
from xverse.finetune.preferences import KtoTrainer, PairTrainer, log_probabilities
from xverse.finetune.settings import Settings, read_settings
from xverse.finetune.trainer import row_of
from xverse.hf import XverseConfig, XverseForCausalLM
from xverse.train.plot import read_metrics


class Preferences(NamedTuple):
    """A loss: sigmoid, hinge, ipo, orpo, simpo or kto, and what belongs to it."""

    kind: str = "sigmoid"
    beta: float = 0.1
    supervised: float = 0.0
    smoothing: float = 0.0
    gamma: float = 0.5
    weights: tuple[float, float] = (1.0, 1.0)

    def settings(self) -> Settings:
        values: dict[str, Any] = {"pref_beta": self.beta, "pref_ftx": self.supervised}
        if self.kind == "kto":
            values |= dict(zip(("kto_chosen_weight", "kto_rejected_weight"), self.weights, strict=True))
        else:
            values |= {
                "pref_loss": self.kind,
                "dpo_label_smoothing": self.smoothing,
                "simpo_gamma": self.gamma,
            }
        values |= {"stage": "kto" if self.kind == "kto" else "dpo", "dataset": "pairs", "do_train": True}
        return read_settings({"model_name_or_path": "nano", "output_dir": "out", **values}, "test")


@pytest.fixture
def pairs(folder: Path) -> Path:
    rows = [
        {
            "conversations": [{"from": "human", "value": f"say hello {i}"}],
            "chosen": {"from": "gpt", "value": "good morning"},
            "rejected": {"from": "gpt", "value": "go away " + "now " * (i % 3)},
        }
        for i in range(40)
    ]
    (folder / "pairs.json").write_text(json.dumps(rows))
    return folder


def test_log_probabilities_are_those_of_each_example_alone(tiny_config: Any) -> None:
    torch.manual_seed(0)
    model = XverseForCausalLM(XverseConfig.from_model_config(tiny_config)).eval()
    draw = torch.Generator().manual_seed(1)
    examples = []
    for length in (9, 5, 12):
        ids = torch.randint(4, tiny_config.vocab_size, (length,), generator=draw).tolist()
        examples.append(Example(ids, [i > 3 for i in range(length)], "x"))
    sums, counts = log_probabilities(model, row_of(examples[:3], 1))
    for place, example in enumerate(examples):
        ids = torch.tensor([example.ids])
        by_token = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        chosen = by_token.gather(1, ids[0, 1:, None])[:, 0][torch.tensor(example.mask[1:])]
        assert sums[place].item() == pytest.approx(chosen.sum().item(), abs=1e-4)
        assert counts[place] == len(chosen)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_margin_grows_on_held_out_pairs(pairs, document, flags, tmp_path, kind) -> None:
    document |= {"stage": "dpo", "dataset": "pairs.json", "finetuning_type": kind, "bf16": "false"}
    document |= {"learning_rate": "2e-3", "val_size": "8", "eval_on_start": ""}
    assert main(["finetune", *flags(document)]) == 0
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    held_out = [r["valid"]["all"] for r in records if "valid" in r]
    assert held_out[0] == pytest.approx(-logsigmoid(torch.tensor(0.0)).item(), abs=1e-5), (
        "the reference itself"
    )
    metrics = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert metrics["eval_margin"] > 0.1
    assert metrics["eval_accuracy"] == 1.0
    assert "32 pairs to train on, 8 held out" in (tmp_path / "out" / "README.md").read_text()


def test_pairs_share_their_prompt_and_skip_what_is_none(pairs, tiny_tokenizer) -> None:
    rows = json.loads((pairs / "pairs.json").read_text())
    same = copy.deepcopy(rows[0])
    same["rejected"] = same["chosen"]
    (pairs / "pairs.json").write_text(json.dumps([*rows, same]))
    values = {"model_name_or_path": "x", "output_dir": "y", "dataset": "pairs.json", "do_train": True}
    settings = read_settings({**values, "dataset_dir": str(pairs), "stage": "dpo"}, "test")
    data = load_data(settings, tiny_tokenizer, 64)
    assert len(data.train) == 80
    assert "1 chosen and rejected alike" in data.notes[0]
    for chosen, rejected in zip(data.train[::2], data.train[1::2], strict=True):
        prompt = chosen.mask.index(True)
        assert chosen.ids[:prompt] == rejected.ids[:prompt]
        assert chosen.ids != rejected.ids


def reference_losses(values: Preferences, chosen: Any, rejected: Any, good: list[bool]) -> list[float]:
    """The losses of the papers in float64. ``chosen`` and ``rejected``: [(sum, reference sum, tokens)] of
    each pair; in kto these are the replies and the mismatched ones."""
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    beta, losses = values.beta, []
    distance = max(0.0, sum(s - r for s, r, _ in rejected) / len(rejected))
    for (sum_w, ref_w, count_w), (sum_l, ref_l, count_l), is_good in zip(chosen, rejected, good, strict=True):
        supervised = -values.supervised * sum_w / count_w
        margin = (sum_w - ref_w) - (sum_l - ref_l)
        if values.kind == "sigmoid":
            e = values.smoothing
            loss = -(1 - e) * math.log(sigmoid(beta * margin)) - e * math.log(sigmoid(-beta * margin))
        elif values.kind == "hinge":
            loss = max(0.0, 1 - beta * margin)
        elif values.kind == "ipo":
            loss = ((sum_w - ref_w) / count_w - (sum_l - ref_l) / count_l - 1 / (2 * beta)) ** 2
        elif values.kind == "simpo":
            loss = -math.log(sigmoid(beta * (sum_w / count_w - sum_l / count_l) - values.gamma))
        elif values.kind == "orpo":
            good_p, bad_p = math.exp(sum_w / count_w), math.exp(sum_l / count_l)
            ratio = math.log(good_p / (1 - good_p)) - math.log(bad_p / (1 - bad_p))
            loss, supervised = -math.log(good_p) - beta * math.log(sigmoid(ratio)), 0.0
        else:  # kto
            reward = beta * (sum_w - ref_w - distance)
            loss = (
                values.weights[0] * (1 - sigmoid(reward)) if is_good else values.weights[1] * sigmoid(reward)
            )
            supervised = supervised if is_good else 0.0
        losses.append(loss + supervised)
    return losses


@pytest.mark.parametrize(
    "values",
    [
        Preferences(),
        Preferences(beta=0.4, smoothing=0.2, supervised=0.5),
        Preferences(kind="hinge", beta=0.3),
        Preferences(kind="ipo", beta=0.2),
        Preferences(kind="orpo", beta=0.3),
        Preferences(kind="simpo", beta=2.0, gamma=1.3, supervised=0.2),
        Preferences(kind="kto", beta=0.5, weights=(1.0, 1.0)),
        Preferences(kind="kto", beta=0.5, weights=(0.7, 1.6), supervised=0.3),
    ],
    ids=lambda values: f"{values.kind}-{values.supervised}",
)
def test_losses_are_their_formulas_in_float64(tiny_config: Any, tmp_path: Path, values: Preferences) -> None:
    torch.manual_seed(0)
    model = XverseForCausalLM(XverseConfig.from_model_config(tiny_config)).eval()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    draw = torch.Generator().manual_seed(1)
    good, examples = [True, False, True], []
    for place, length in enumerate((9, 12, 6, 15, 11, 8)):
        ids = torch.randint(4, tiny_config.vocab_size, (length,), generator=draw).tolist()
        tag = good[place // 2] if values.kind == "kto" else None
        examples.append(Example(ids, [i > 3 for i in range(length)], "x", tag))
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    options = {"examples": examples, "held_out": [], "row_length": None, "pad_id": 1}
    kind = KtoTrainer if values.kind == "kto" else PairTrainer
    trainer = kind(model=model, args=args, **options, reference=reference, settings=values.settings())
    batch = row_of(examples[:6], 1)
    losses, _ = trainer._losses(model, batch)
    figures = []
    for example in examples:
        ids, mask = torch.tensor([example.ids]), torch.tensor(example.mask[1:])
        logs = [
            copy.deepcopy(m)
            .double()(input_ids=ids)
            .logits[0, :-1]
            .log_softmax(-1)
            .gather(1, ids[0, 1:, None])
            for m in (model, reference)
        ]
        figures.append((*(log[:, 0][mask].sum().item() for log in logs), int(mask.sum())))
    expected = reference_losses(values, figures[::2], figures[1::2], good)
    assert losses.tolist() == pytest.approx(expected, abs=2e-5)
    losses.mean().backward()
    filler, _ = trainer._losses(model, row_of([], 1))
    assert filler.sum().item() == 0.0


def test_kto_learns_which_replies_are_good(pairs: Path, document, flags, tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say hello {i}"},
                {"role": "assistant", "content": "good morning" if i % 2 else "go away now"},
            ],
            "label": bool(i % 2),
        }
        for i in range(40)
    ]
    (pairs / "tagged.json").write_text(json.dumps(rows))
    document |= {"stage": "kto", "dataset": "tagged.json", "finetuning_type": "lora", "bf16": "false"}
    document |= {"learning_rate": "5e-3", "val_size": "8", "eval_on_start": ""}
    assert main(["finetune", *flags(document)]) == 0
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    held_out = [r["valid"]["all"] for r in records if "valid" in r]
    assert held_out[0] == pytest.approx(0.5, abs=1e-5), "the reference itself"
    metrics = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert metrics["eval_accuracy"] == 1.0
    (pairs / "tagged.json").write_text(json.dumps([row for row in rows if row["label"]]))
    document |= {"output_dir": str(tmp_path / "other")}
    assert main(["finetune", *flags(document)]) == 2
