"""Examples without padding and packed ones cost what they cost alone; orders and evaluation are exact."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

from xverse.config import UserError
from xverse.finetune.encode import Example, load_data
from xverse.finetune.settings import read_settings
from xverse.finetune.trainer import FILLER, FinetuneTrainer, Order, Rows, row_of
from xverse.hf import XverseConfig, XverseForCausalLM
from xverse.model import IGNORE


@pytest.fixture
def model(tiny_config: Any) -> Any:
    torch.manual_seed(0)
    return XverseForCausalLM(XverseConfig.from_model_config(tiny_config))


@pytest.fixture
def examples(tiny_config: Any) -> list[Example]:
    """Of 3 to 30 tokens; the loss is on the second half of each, or in spots."""
    draw = torch.Generator().manual_seed(1)
    made = []
    for number in range(23):
        length = 3 + int(torch.randint(28, (), generator=draw))
        ids = torch.randint(4, tiny_config.vocab_size, (length,), generator=draw).tolist()
        mask = [i >= length // 2 for i in range(length)]
        if number % 3 == 0:
            mask = [i % 2 == 1 for i in range(length)]
        made.append(Example(ids, mask, f"e[{number}]"))
    return made


def padded(examples: list[Example], side: str) -> dict[str, Tensor]:
    width = max(len(e.ids) for e in examples)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for e in examples:
        gap = width - len(e.ids)
        labels = [i if m else IGNORE for i, m in zip(e.ids, e.mask, strict=True)]
        for key, kept, fill in (
            ("input_ids", e.ids, 1),
            ("labels", labels, IGNORE),
            ("attention_mask", [1] * len(e.ids), 0),
        ):
            rows[key].append([fill] * gap + kept if side == "left" else kept + [fill] * gap)
    return {key: torch.tensor(value) for key, value in rows.items()}


def loss_and_gradient(model: Any, batches: list[dict[str, Tensor]]) -> tuple[float, Tensor]:
    """Of all batches together, per token with loss."""
    model.zero_grad()
    model.train()
    count = sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        batch = {key: value for key, value in batch.items() if key != "names"}
        loss = model(**batch, use_cache=False, num_items_in_batch=count).loss
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters()])


def test_no_padding_any_padding_and_packing_have_one_loss(model, examples) -> None:
    whole = loss_and_gradient(model, [row_of(examples, 1)])
    alone = loss_and_gradient(model, [row_of([examples[i]], 1) for i in range(len(examples))])
    right = loss_and_gradient(model, [padded(examples, "right")])
    left = loss_and_gradient(model, [padded(examples, "left")])
    rows = Rows(examples, 64, seed=0)
    assert len(rows) < 0.6 * len(examples)
    assert max(rows.lengths()) <= 64
    packed = loss_and_gradient(model, [row_of([examples[i] for i in row], 1) for row in rows.rows])
    filled = loss_and_gradient(model, [row_of(examples, 1), row_of([], 1)])
    for other in (alone, right, left, packed, filled):
        assert other[0] == pytest.approx(whole[0], abs=1e-5)
        torch.testing.assert_close(other[1], whole[1], rtol=1e-4, atol=1e-6)


def test_a_packed_example_does_not_see_its_neighbour(model, examples) -> None:
    model.eval()
    first = row_of(examples[:2], 1)
    second = row_of([examples[2], examples[1]], 1)
    out = []
    for batch in (first, second):
        logits = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        out.append(logits[0, -len(examples[1].ids) :])
    torch.testing.assert_close(*out, rtol=1e-5, atol=1e-5)


def test_an_epoch_holds_each_row_once_and_fills_whole_steps() -> None:
    order = Order(23, 8, seed=3)
    first = list(order)
    assert len(first) == len(order) == 24
    assert Counter(first) == Counter([*range(23), FILLER])
    order.set_epoch(1)
    assert list(order) != first
    order.set_epoch(0)
    assert list(order) == first


def test_grouped_by_length_a_step_has_rows_alike() -> None:
    lengths = [(7 * n) % 101 for n in range(230)]
    order = Order(230, 8, seed=3, lengths=lengths)
    rows = list(order)
    assert Counter(rows) == Counter([*range(230), FILLER, FILLER])
    steps = [rows[at : at + 8] for at in range(0, len(rows), 8)]
    spread = [
        max(lengths[n] for n in step) - min(lengths[n] for n in step) for step in steps if FILLER not in step
    ]
    assert max(spread) < 10
    longest = [max(lengths[n] for n in step) for step in steps]
    assert longest != sorted(longest, reverse=True), "steps are mixed"
    order.set_epoch(1)
    assert list(order) != rows


def test_packed_documents_of_continued_pretraining_stay_apart(model, tiny_tokenizer, tmp_path) -> None:
    """Through the data path: the loss of packed rows is that of each document alone."""
    texts = ["the sun rises", "in the east", "and sets in the west again", "good morning"]
    (tmp_path / "t.txt").write_text("\n".join(texts))
    values = {"model_name_or_path": "x", "output_dir": "y", "do_train": True, "stage": "pt"}
    found = read_settings({**values, "dataset": "t.txt", "dataset_dir": str(tmp_path)}, "test")
    assert found.packs
    documents = load_data(found, tiny_tokenizer, 64).train
    rows = Rows(documents, 64, seed=0)
    assert len(rows) < len(documents)
    packed = loss_and_gradient(model, [row_of([documents[i] for i in row], 1) for row in rows.rows])
    alone = loss_and_gradient(model, [row_of([documents[i]], 1) for i in range(len(documents))])
    assert packed[0] == pytest.approx(alone[0], abs=1e-5)
    torch.testing.assert_close(packed[1], alone[1], rtol=1e-4, atol=1e-6)


def test_a_batch_without_loss_is_no_number(model, examples, tmp_path) -> None:
    bare = [Example(e.ids, [False] * len(e.ids), e.name) for e in examples]
    run = trainer(model, bare, tmp_path, per_device_train_batch_size=2, max_steps=1)
    with pytest.raises(UserError, match=r"no token with loss.*e\[\d+\]"):
        run.train()


def trainer(model: Any, examples: list[Example], out: Any, **values: Any) -> FinetuneTrainer:
    args = TrainingArguments(
        output_dir=str(out),
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        **values,
    )
    return FinetuneTrainer(
        model=model, args=args, examples=examples, held_out=examples, row_length=None, pad_id=1
    )


@pytest.mark.parametrize("size", [1, 4, 50])
def test_held_out_loss_is_per_token_whatever_the_batch(model, examples, tmp_path, size) -> None:
    expected, _ = loss_and_gradient(model, [padded(examples, "right")])
    found = trainer(model, examples, tmp_path, per_device_eval_batch_size=size).evaluate()
    assert found["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_a_loss_that_is_no_number_names_the_examples(model, examples, tmp_path) -> None:
    with torch.no_grad():
        model.lm_head.weight[5, 0] = torch.nan
    run = trainer(model, examples, tmp_path, per_device_train_batch_size=2, max_steps=1)
    with pytest.raises(UserError, match=r"step 1: the loss is nan on e\[\d+\], e\[\d+\]"):
        run.train()
