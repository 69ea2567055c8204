"""The order, packing and loss mask of fine-tuning examples."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xverse.config import UserError
from xverse.finetune.examples import Dataset, DatasetConfig, Example, ExampleFeed, load_datasets
from xverse.model import IGNORE
from xverse.tokenizer import encode_dialogue

LENGTH = 32


def datasets(sizes: list[int], repeat: int) -> list[Dataset]:
    """One dataset whose i-th example is ``size`` times the token 10 + i, with loss on its second half."""
    examples: list[Example] = [
        ([10 + i] * size, [place >= size // 2 for place in range(size)]) for i, size in enumerate(sizes)
    ]
    return [Dataset("made", repeat, train=examples)]


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(2, LENGTH), min_size=1, max_size=60),
    repeat=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_every_epoch_holds_every_example_as_often_as_asked(sizes: list[int], repeat: int, seed: int) -> None:
    feed = ExampleFeed(datasets(sizes, repeat), LENGTH, pad_id=1, seed=seed)
    rows = len(feed._rows(0))
    for epoch in range(2):
        start = sum(len(feed._rows(e)) for e in range(epoch))
        tokens: Counter[int] = Counter()
        for n in range(start, start + len(feed._rows(epoch))):
            tokens.update(feed.batch(n, n + 1).tokens.flatten().tolist())
        tokens.pop(1, None)
        assert tokens == Counter({10 + i: size * repeat for i, size in enumerate(sizes)})
    again = ExampleFeed(datasets(sizes, repeat), LENGTH, pad_id=1, seed=seed)
    assert again.row(rows) == feed.row(rows)  # random access equals going through in order


def test_rows_keep_examples_apart_and_the_mask_in_place() -> None:
    feed = ExampleFeed(datasets([6, 6, 6], 1), LENGTH, pad_id=1, seed=0)
    batch = feed.batch(0, 1)
    assert batch.tokens.shape == (1, LENGTH)
    for document in batch.document_ids.unique():
        inside = batch.document_ids == document
        assert len(batch.tokens[inside].unique()) == 1, "a document is one example"
    # 6 tokens, loss on the last 3: predicted from places 2, 3 and 4
    assert (batch.targets != IGNORE).sum() == 9
    assert torch.equal(batch.targets[0, :6] != IGNORE, torch.tensor([False, False, True, True, True, False]))


def test_files_of_a_folder_are_bounded_filtered_and_split(tmp_path, tiny_tokenizer, capsys) -> None:
    good = [{"instruction": f"say {i}", "input": "", "output": "one"} for i in range(40)]
    long = [{"instruction": "speak", "input": "", "output": "many words " * 30}]
    named = [{"instruction": "who", "input": "", "output": "I am {{name}}."}]
    (tmp_path / "a.json").write_text(json.dumps(good + long + named))
    (tmp_path / "b.json").write_text(json.dumps([{"text": "no instruction"}]))
    config = DatasetConfig(path=tmp_path, max_examples=20, max_reply_tokens=20)
    found = load_datasets([config], tiny_tokenizer, length=400, valid_share=0.1, seed=0)
    assert [(dataset.name, len(dataset.train), len(dataset.valid)) for dataset in found] == [
        ("a.json", 18, 2)
    ]
    said = " ".join(capsys.readouterr().err.split())
    assert "1 with answers of more than 20 tokens" in said
    assert "1 with an unfilled {{placeholder}}" in said
    assert "left out" in said
    assert "b.json" in said
    same = load_datasets([config], tiny_tokenizer, length=400, valid_share=0.1, seed=0)
    assert same == found
    other = load_datasets([config], tiny_tokenizer, length=400, valid_share=0.1, seed=1)
    assert other != found


def test_nothing_usable_is_one_clear_line(tmp_path, tiny_tokenizer) -> None:
    config = DatasetConfig(path=tmp_path / "none")
    with pytest.raises(UserError, match="no such file or folder"):
        load_datasets([config], tiny_tokenizer, length=64, valid_share=0.0, seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no usable instructions"):
        load_datasets(
            [DatasetConfig(path=tmp_path / "empty")], tiny_tokenizer, length=64, valid_share=0, seed=0
        )


def test_loss_stands_on_the_assistant_alone(tiny_tokenizer) -> None:
    ids, mask = encode_dialogue(
        tiny_tokenizer,
        [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good morning"}],
    )
    answer = [token for token, kept in zip(ids, mask, strict=True) if kept]
    assert tiny_tokenizer.decode(answer) == "good morning"
    assert answer[-1] == tiny_tokenizer.eos_id
