from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from xverse.config import UserError
from xverse.data.feed import PretrainFeed, prefetch, token_byte_lengths
from xverse.data.mixture import MixtureConfig
from xverse.data.packing import IGNORE
from xverse.data.prepare.pipeline import PrepareRecipe, prepare


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("feed") / "out"
    prepare(PrepareRecipe(corpus, out, vocab_size=600, valid_share=0.1))
    return out


def feed(folder: Path, **options: object) -> PretrainFeed:
    settings = {"mixture": MixtureConfig({"en": 0.6, "*": 0.4}, 0.5), "length": 48, "seed": 3, **options}
    return PretrainFeed(folder, **settings)  # type: ignore[arg-type]


def test_a_batch_is_the_same_however_it_is_split(folder: Path) -> None:
    whole = feed(folder)
    for step in (0, 7, 12_345, 2):  # any order, far ahead and back
        first = step * 8
        batch = whole.batch(first, first + 8)
        assert batch.tokens.shape == batch.targets.shape == batch.document_ids.shape == (8, 48)
        assert (batch.tokens.dtype, batch.targets.dtype) == (torch.int64, torch.int64)
        assert batch.document_ids.dtype == torch.int32
        for cuts in ([0, 8], [0, 4, 8], [0, 1, 3, 6, 8]):
            parts = [feed(folder).batch(first + a, first + b) for a, b in itertools.pairwise(cuts)]
            for name in ("tokens", "targets", "document_ids"):
                assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


def test_another_seed_is_another_order(folder: Path) -> None:
    assert not torch.equal(feed(folder).batch(0, 24).tokens, feed(folder, seed=4).batch(0, 24).tokens)


def test_shares_reach_the_batches(folder: Path) -> None:
    source = feed(folder)
    drawn = [source.mixture.locate(n)[0] for n in range(1_000)]
    assert drawn.count("en") == pytest.approx(600, abs=2)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_validation_scores_every_token_but_the_first_and_exactly_their_bytes(
    folder: Path, batch_size: int
) -> None:
    source = feed(folder)
    assert source.valid_names == ["code_py", "en", "zh"]
    for name in source.valid_names:
        shard = source.valid[name]
        scored, size = [], 0
        for batch, text_bytes in source.valid_batches(name, batch_size):
            scored.append(batch.targets[batch.targets != IGNORE].numpy())
            size += text_bytes
            ids, targets = batch.document_ids, batch.targets
            assert torch.all((targets[:, :-1] == IGNORE) | (ids[:, :-1] == ids[:, 1:]))
        wanted = np.concatenate([shard.document(i)[1:] for i in range(len(shard))])
        assert np.array_equal(np.concatenate(scored), wanted)
        firsts = sum(int(source.token_bytes[shard.document(i)[0]]) for i in range(len(shard)))
        assert size + firsts == shard.header.text_bytes


def test_validation_stops_at_the_cap_and_pads_the_end(folder: Path) -> None:
    source = feed(folder)
    rows = [batch for batch, _ in source.valid_batches("en", 1, max_tokens=50)]
    assert len(rows) == 2
    last = list(source.valid_batches("en", 1))[-1][0]
    padded = -source.valid["en"].header.tokens % 48
    assert padded > 0
    assert torch.all(last.tokens[0, -padded:] == source.tokenizer.pad_id)
    assert torch.all(last.targets[0, -padded:] == IGNORE)
    assert (
        len(set(last.document_ids[0, -padded:].tolist()) & set(last.document_ids[0, :-padded].tolist())) == 0
    )


def test_bytes_of_tokens_add_up_to_the_text(folder: Path) -> None:
    source = feed(folder)
    lengths = token_byte_lengths(source.tokenizer)
    for text in ("plain words", "你好，世界 🙂", "  two  spaces\n\ttab", "ℵ rare ▁ mark"):
        assert lengths[source.tokenizer.encode(text)].sum() == len(text.encode())
    assert lengths[[0, 1, 2, 3]].tolist() == [0, 0, 0, 0]


def test_wrong_input(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a prepared folder"):
        feed(tmp_path)
    with pytest.raises(UserError, match="unknown source 'code'"):
        feed(folder, mixture=MixtureConfig({"code": 1.0}))
    with pytest.raises(UserError, match="unknown validation source 'xx'"):
        next(feed(folder).valid_batches("xx", 1))


def test_prefetch_keeps_the_order_raises_errors_and_stops() -> None:
    assert list(prefetch(range(100), depth=3)) == list(range(100))

    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    items = prefetch(failing())
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)

    made = []
    endless = prefetch((made.append(n) or n for n in itertools.count()), depth=2)
    assert [next(endless) for _ in range(3)] == [0, 1, 2]
    endless.close()  # type: ignore[attr-defined]
    assert len(made) < 10
    assert math.isfinite(made[-1])
