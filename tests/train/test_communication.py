"""Communication that nothing hides is seen, in real processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from xverse.train.communication import joined, length, overlap

intervals = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda x: (x[0], x[0] + x[1])))


@given(intervals, intervals)
def test_lengths_and_overlaps_of_intervals(
    some: list[tuple[int, int]], others: list[tuple[int, int]]
) -> None:
    def points(intervals: list[tuple[int, int]]) -> set[int]:
        return {point for start, end in intervals for point in range(start, end)}

    one, other = joined(some), joined(others)
    assert points(one) == points(some)
    assert length(one) == len(points(some))
    assert overlap(one, other) == len(points(some) & points(others))


SLOWED = """
import json, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from xverse.data.feed import Batch
from xverse.model import XverseConfig, XverseForCausalLM, init_weights
from xverse.train import TrainConfig
from xverse.train.communication import watching
from xverse.train.loop import train_step
from xverse.train.parallel import distribute, world_of

shape = dict(vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
with world_of("ddp") as world:
    model = XverseForCausalLM(XverseConfig(**shape))
    init_weights(model, 0)
    config = TrainConfig(steps=9, batch_size=4, learning_rate=1e-3, parallel="ddp", dtype="float32")
    replica = distribute(model, config, world)
    late = [0.0]

    def summed(state, bucket):
        if world.rank == 1:
            time.sleep(late[0])
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

    replica.ddp.register_comm_hook(None, summed)
    tokens = torch.full((2, 32), 5)
    batch = Batch(tokens, tokens, torch.zeros_like(tokens, dtype=torch.int32))
    found = []
    for late[0] in (0.0, 0.0, 0.4):
        world.wait()
        with watching(world.device) as read:
            train_step(replica, batch, config)
        found.append(read())
    (Path(sys.argv[1]) / f"{world.rank}.json").write_text(json.dumps(found))
"""


def test_a_slowed_all_reduce_is_seen(torchrun: Callable[..., Any], tmp_path: Path) -> None:
    """Rank 1 comes 0.4 s late to an all-reduce, so rank 0 waits in it with nothing to compute."""
    process = torchrun(2, str(tmp_path), script=SLOWED)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    _, quick, slowed = json.loads((tmp_path / "0.json").read_text())
    assert 0.35 < slowed[0] <= slowed[1]
    assert slowed[0] > quick[0] + 0.2
    assert json.loads((tmp_path / "1.json").read_text())[-1][0] < 0.3, "the late one did not wait"


def test_a_run_records_it_and_says_it(
    write_recipe: Callable[..., Path], torchrun: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = write_recipe(steps=6, parallel="fsdp", communication_every=2)
    process = torchrun(2, str(recipe))
    output, _ = process.communicate()
    assert process.returncode == 0, output
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    found = [r["communication"] for r in map(json.loads, lines) if "communication" in r]
    assert len(found) == 2
    assert all(0 < each["exposed_seconds"] <= each["all_seconds"] for each in found)
    assert "· communication " in output
    assert "in 2 profiled steps" in (tmp_path / "run" / "report.md").read_text()
