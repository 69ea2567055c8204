"""A world of 1,024 of which one process is real: what process 0 does must not grow with the others."""

from __future__ import annotations

import datetime
import json
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.studies import scale
from xverse.data.feed import PretrainFeed
from xverse.formats.parts import Index, Part, read_header
from xverse.train.checkpoint import OwnPlan, _OwnFile
from xverse.train.parallel import add_up

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
            planner = OwnPlan(rank == 0)
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


@pytest.mark.parametrize("count", [2, 3, 6, 8])
def test_sums_agree_among_gloo_contexts(count: int) -> None:
    """Each context asserts that it has the sum; some numbers are no power of two."""
    assert scale.gloo(count, rounds=3)["doubling"] > 0


def test_a_sum_is_the_same_bits_everywhere_and_a_tree(tmp_path: Path) -> None:
    values = [0.1, 1e16, -1e16, 0.3, 7.0, 1e-9]
    found: dict[int, float] = {}

    def work(rank: int) -> None:
        store = dist.FileStore(str(tmp_path / "store"), len(values))
        group = dist.ProcessGroupGloo(store, rank, len(values), datetime.timedelta(seconds=60))
        total = torch.tensor([values[rank]], dtype=torch.float64)
        add_up(total, rank, len(values), group)
        found[rank] = total.item()
        barrier.wait()

    barrier = threading.Barrier(len(values))
    scale._in_threads(len(values), work)
    a, b, c, d, e, f = values
    assert set(found.values()) == {((a + e) + (b + f)) + (c + d)}


def test_a_process_reads_one_header_and_finds_its_parts(tmp_path: Path) -> None:
    """That the parts are found in the file of their rank is asserted inside."""
    few, more = (scale.checkpoint_headers("nano", count, theirs=True) for count in (2, 8))
    assert more["torch_headers_bytes"] == pytest.approx(4 * few["torch_headers_bytes"], rel=0.05)
    assert more["index_bytes"] < more["torch_headers_bytes"] / 5
    large = scale.checkpoint_headers("nano", 256)
    assert large["header_s"] < 0.1
    assert large["index_s"] < 1


def test_the_order_of_documents_takes_no_memory_for_each() -> None:
    small, large = (scale.document_order(count) for count in (200_000, 1_000_000))
    assert large["bytes"] - small["bytes"] < 0.05 * (large["documents"] - small["documents"])
    assert large["bytes"] < 3_000_000


def test_parts_are_found_across_files(tmp_path: Path) -> None:
    """A matrix in four pieces of two dimensions, a vector in two, and a number."""
    pieces = {
        "a": {"matrix": ((0, 0), (2, 3)), "vector": ((0,), (4,)), "step": ((), ())},
        "b": {"matrix": ((0, 3), (2, 2)), "vector": ((4,), (3,))},
        "c": {"matrix": ((2, 0), (5, 3))},
        "d": {"matrix": ((2, 3), (5, 2))},
    }
    for file, entries in pieces.items():
        custom = {name: {"saved_offsets": list(offset)} for name, (offset, _) in entries.items()}
        header: dict[str, object] = {"__metadata__": {"DCP_SHARDING_INFO": json.dumps(custom)}}
        for name, (_, shape) in entries.items():
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [0, 0]}
        text = json.dumps(header).encode()
        (tmp_path / file).write_bytes(len(text).to_bytes(8, "little") + text)
    index = Index(list(pieces), [read_header(tmp_path / file) for file in pieces])
    assert sorted(index) == ["matrix", "step", "vector"]
    assert index.dtype("matrix") == torch.bfloat16
    assert [index.shape(name) for name in ("matrix", "vector", "step")] == [(7, 5), (7,), ()]
    assert {part.file for part in index.parts("matrix", (0, 0), (7, 5))} == set("abcd")
    assert {part.file for part in index.parts("matrix", (1, 3), (1, 2))} == {"b"}
    assert index.parts("vector", (3,), (1,)) == [Part("a", (0,), (4,))]
    assert index.parts("vector", (3,), (0,)) == []
    assert index.parts("step", (), ()) == [Part("a", (), ())]
