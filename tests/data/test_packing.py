from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.scale import examples
from xverse.data.order import random_order
from xverse.data.packing import IGNORE, PackedSequence, StreamPacker, pack_examples
from xverse.data.shards import Shard

MakeShard = Callable[..., Shard]
# The fixture only makes fresh folders, so examples may share it.
shared = settings(
    deadline=None, max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def numbered(lengths: Sequence[int]) -> list[list[int]]:
    """Documents in which every token is unique: 1,000 × document + position."""
    return [[1_000 * i + j for j in range(length)] for i, length in enumerate(lengths)]


def check_row(row: PackedSequence, lengths: Sequence[int]) -> None:
    for i, token in enumerate(row.tokens):
        document, place = divmod(int(token), 1_000)
        if place + 1 == lengths[document]:
            assert row.targets[i] == IGNORE
        else:
            assert row.targets[i] == token + 1
    same = np.diff(row.document_ids) == 0
    assert np.all(np.diff(row.tokens)[same] == 1)  # within a document the tokens follow each other
    assert row.document_ids[0] == 0
    assert np.all((np.diff(row.document_ids) == 0) | (np.diff(row.document_ids) == 1))


@shared
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    length=st.integers(1, 70),
    seed=st.integers(0, 3),
    run=st.integers(1, 4),
    runs=st.integers(1, 4),
)
def test_every_token_stands_once_in_each_epoch(
    make_shard: MakeShard, lengths: list[int], length: int, seed: int, run: int, runs: int
) -> None:
    shard = make_shard(numbered(lengths))
    packer = StreamPacker(shard, length, seed, run=run, block=run * runs)
    epoch = sum(lengths)
    rows = [packer.sequence(k) for k in range(-(-2 * epoch // length))]
    for row in rows:
        assert (row.tokens.dtype, row.targets.dtype, row.document_ids.dtype) == (np.int64, np.int64, np.int32)
        check_row(row, lengths)
    stream = np.concatenate([row.tokens for row in rows])
    expected = Counter(token for document in numbered(lengths) for token in document)
    assert Counter(stream[:epoch].tolist()) == expected
    assert Counter(stream[epoch : 2 * epoch].tolist()) == expected
    fresh = StreamPacker(shard, length, seed, run=run, block=run * runs)
    last = len(rows) - 1
    assert fresh.sequence(last).tokens.tolist() == rows[last].tokens.tolist()


def documents_of(packer: StreamPacker, epoch: int = 0) -> list[int]:
    """The order of an epoch's documents, which are of one token each."""
    count = len(packer.shard)
    return [int(packer.sequence(epoch * count + k).tokens[0]) for k in range(count)]


def test_blocks_mix_documents_from_all_over_the_shard(make_shard: MakeShard) -> None:
    packer = StreamPacker(make_shard([[i] for i in range(1000)]), 1, seed=1, run=10, block=100)
    orders = [documents_of(packer, epoch) for epoch in (0, 1)]
    assert packer.blocks == 10
    for order in orders:
        assert sorted(order) == list(range(1000))
        for start in range(0, 1000, 100):
            block = order[start : start + 100]
            runs = {i // 10 for i in block}
            assert len(runs) == 10
            assert max(runs) - min(runs) > 30
            assert block != sorted(block)
    assert {i // 10 for i in orders[0][:100]} != {i // 10 for i in orders[1][:100]}


def test_a_shard_of_one_block_is_shuffled_as_a_whole(make_shard: MakeShard) -> None:
    packer = StreamPacker(make_shard([[i] for i in range(50)]), 1, seed=1)
    assert packer.blocks == 1
    name = packer.shard.name
    for epoch in (0, 1):
        assert documents_of(packer, epoch) == random_order(50, "documents", 1, name, epoch).tolist()


def test_a_row_across_documents_by_hand(make_shard: MakeShard) -> None:
    packer = StreamPacker(make_shard([[7, 8, 9, 3]]), 6, seed=0)
    row = packer.sequence(0)
    assert row.tokens.tolist() == [7, 8, 9, 3, 7, 8]
    assert row.targets.tolist() == [8, 9, 3, IGNORE, 8, 9]  # the cut document's last token keeps its target
    assert row.document_ids.tolist() == [0, 0, 0, 0, 1, 1]


def test_epochs_are_shuffled_by_seed_and_source(make_shard: MakeShard) -> None:
    documents = [[i] for i in range(50)]
    shard = make_shard(documents)
    packer = StreamPacker(shard, 50, seed=1)
    orders = [
        packer.sequence(0),
        packer.sequence(1),
        StreamPacker(shard, 50, seed=2).sequence(0),
        StreamPacker(make_shard(documents, "zh"), 50, seed=1).sequence(0),
    ]
    assert len({tuple(row.tokens.tolist()) for row in orders}) == 4
    assert StreamPacker(shard, 50, seed=1).sequence(1).tokens.tolist() == orders[1].tokens.tolist()
    assert packer.sequences_per_epoch == 1


@settings(deadline=None)
@given(st.integers(1, 64).flatmap(lambda T: st.tuples(st.just(T), st.lists(st.integers(1, T), max_size=60))))
def test_best_fit_loses_nothing_and_never_overflows(case: tuple[int, list[int]]) -> None:
    length, lengths = case
    bins = pack_examples(lengths, length)
    assert sorted(index for items in bins for index in items) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in items) <= length for items in bins)
    # Any two bins together overflow one, else the fuller would have taken what is in the other.
    fill = sorted(sum(lengths[index] for index in items) for items in bins)
    assert len(fill) < 2 or fill[0] + fill[1] > length


def test_best_fit_takes_the_tightest_bin() -> None:
    assert pack_examples([7, 5, 3, 5, 2], 10) == [[0, 2], [1, 3], [4]]


def test_an_over_long_example_is_the_callers_mistake() -> None:
    with pytest.raises(AssertionError):
        pack_examples([5, 11], 10)
