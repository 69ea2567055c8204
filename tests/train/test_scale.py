"""A world of 1,024 of which one process is real: what process 0 does must not grow with the others."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from xverse.bench import scale
from xverse.data.feed import PretrainFeed
from xverse.train.checkpoint import _OwnFile, _OwnPlan

RANKS = 1024


def test_every_rank_finds_its_rows_without_those_of_others(
    feed: PretrainFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_size, step = 2 * RANKS, 3
    first = step * batch_size
    whole = feed.batch(first, first + batch_size)
    taken: list[int] = []
    locate = feed.mixture.locate
    monkeypatch.setattr(feed.mixture, "locate", lambda n: (taken.append(n), locate(n))[1])
    for rank in (0, 1, 511, 1023):
        mine = feed.batch(first + 2 * rank, first + 2 * rank + 2)
        torch.testing.assert_close(mine.tokens, whole.tokens[2 * rank : 2 * rank + 2])
        torch.testing.assert_close(mine.targets, whole.targets[2 * rank : 2 * rank + 2])
    assert taken == [step * batch_size + 2 * rank + i for rank in (0, 1, 511, 1023) for i in (0, 1)]


def test_a_checkpoint_is_planned_by_each_rank_alone() -> None:
    """The same pieces, whatever the world's size, each with one writer, and no word between the processes."""
    written: dict[tuple[str, tuple[int, ...]], int] = {}
    rows: dict[str, int] = {}
    world = 12  # 256 and 768 rows do not divide by it: some ranks' shares are short
    for rank in range(world):
        with scale.sharded_tensors("nano", world, rank) as tensors:
            planner = _OwnPlan(rank == 0)
            planner.set_up_planner(tensors, is_coordinator=True)
            plan = planner.create_local_plan()
        (own,), _ = planner.create_global_plan(_OwnFile("unused", rank).prepare_global_plan([plan]))
        assert own.storage_data == {"shard_index": rank + 1}
        for item in own.items:
            assert item.tensor_data is not None
            where = item.index.fqn, tuple(item.tensor_data.chunk.offsets)
            assert where not in written, f"{where} is written by {written[where]} and {rank}"
            written[where] = rank
            sizes = item.tensor_data.chunk.sizes
            rows[item.index.fqn] = rows.get(item.index.fqn, 0) + (sizes[0] if len(sizes) else 1)
    wanted = {name: tensor.shape[0] if tensor.dim() else 1 for name, tensor in tensors.items()}
    assert rows == wanted, "every row is written"
    start = time.perf_counter()
    found = scale.own_plan("nano", RANKS)
    assert found["own_plan_s"] < 2
    assert time.perf_counter() - start < 10


def test_gathered_plans_would_grow_with_the_ranks() -> None:
    """Why the planner is ours: what torch's sends to process 0 is so much for every rank."""
    some, more = (scale.checkpoint_plan("nano", count)["plan_bytes_in"] for count in (4, 16))
    assert more == pytest.approx(4 * some, rel=0.1)


def test_the_furthest_behind_of_1024_is_found() -> None:
    assert scale.heartbeats(RANKS)["heartbeats_s"] < 2


def test_a_row_costs_the_same_in_a_small_world_and_a_large_one() -> None:
    small, large = (scale.data_order(count)["row_s"] for count in (16, RANKS))
    assert large < 20 * small + 0.01


def test_sums_agree_among_gloo_contexts() -> None:
    assert scale.gloo(8, rounds=3) > 0


def test_headers_of_all_files_are_read(tmp_path: Path) -> None:
    few, more = (scale.checkpoint_headers("nano", count)["headers_bytes"] for count in (2, 8))
    assert more == pytest.approx(4 * few, rel=0.05)
