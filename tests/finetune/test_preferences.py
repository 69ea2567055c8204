"""DPO: the loss by its definition, and a margin that grows on pairs it has not seen."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import TrainingArguments

from xverse.cli import main
from xverse.finetune.encode import Example, load_data
from xverse.finetune.preferences import PairTrainer, log_probabilities
from xverse.finetune.settings import read_settings
from xverse.finetune.trainer import join
from xverse.hf import XverseConfig, XverseForCausalLM
from xverse.train.plot import read_metrics


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
    sums, counts = log_probabilities(model, join(examples, [0, 1, 2], 1))
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


def test_orpo_is_its_formula(tiny_config: Any, tmp_path: Path) -> None:
    """Mean log-probabilities of the two answers, their odds, and the chosen one's own loss."""
    torch.manual_seed(0)
    model = XverseForCausalLM(XverseConfig.from_model_config(tiny_config)).eval()
    draw = torch.Generator().manual_seed(1)
    examples = []
    for length in (9, 12):
        ids = torch.randint(4, tiny_config.vocab_size, (length,), generator=draw).tolist()
        examples.append(Example(ids, [i > 3 for i in range(length)], "x"))
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    options = {"examples": examples, "held_out": [], "row_length": None, "pad_id": 1, "reference": None}
    trainer = PairTrainer(model=model, args=args, **options, beta=0.3, kind="orpo", supervised=0.0)
    batch = join(examples, [0, 1], 1)
    loss, margin = trainer._losses(model, batch)
    sums, counts = log_probabilities(model, batch)
    chosen, rejected = (sums / counts).double().exp().tolist()
    ratio = math.log(chosen / (1 - chosen)) - math.log(rejected / (1 - rejected))
    expected = -math.log(chosen) + 0.3 * math.log1p(math.exp(-ratio))
    assert loss.tolist() == pytest.approx([expected], abs=1e-4)
    assert margin.tolist() == pytest.approx([0.3 * ratio], abs=1e-4)
