"""The padded steps of CUDA graphs, run without CUDA, give the same tokens as the engine without them."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import pytest
import torch

from xverse.engine import Engine, Request, SamplingParams, Speculation
from xverse.engine.cache import PagedCache
from xverse.engine.graphs import DecodeGraphs
from xverse.engine.sizing import chunk_bytes

GREEDY = SamplingParams(temperature=0)
NEVER = (10**6,)


@pytest.fixture
def short(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model with a context of 192 positions, because tables are as wide as the context."""
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, max_position_embeddings=192))
    return model


def generate(engine: Engine, prompts: list[list[int]]) -> list[list[int | None]]:
    handles = [
        engine.submit(Request(prompt_ids=prompt, sampling=SamplingParams.greedy(40), stop_ids=NEVER))
        for prompt in prompts
    ]
    said: dict[int, list[int | None]] = {handle: [] for handle in handles}
    while engine.busy:
        for event in engine.step():
            said[event.handle].append(event.token_id)
    return list(said.values())


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("speculation", [None, Speculation()])
def test_padded_steps_change_nothing(
    short: Any, tiny_tokenizer: Any, kv_dtype: str, speculation: Speculation | None
) -> None:
    prompts = [[5, 6], [20, 30] * 20, [(7 * n) % 200 + 4 for n in range(90)]]
    found = []
    for padded in (False, True):
        engine = Engine(short, tiny_tokenizer, kv_dtype=kv_dtype, speculation=speculation)
        engine._fused_step = DecodeGraphs(short, engine._cache) if padded else None
        found.append(generate(engine, prompts))
        if padded:
            assert engine._fused_step is not None
            assert len(engine._fused_step._inputs.tokens) == 64  # type: ignore[union-attr]
    assert found[0] == found[1]


class FakeGraph:
    """A recorded graph that runs the pass again when it is replayed."""

    pools: ClassVar[list[object]] = []

    def __init__(self) -> None:
        self.replays = 0

    def pool(self) -> object:
        return "the pool"

    def replay(self) -> None:
        self.replays += 1
        self.run()


def test_graphs_are_recorded_at_once_and_replayed(
    short: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest first, in one pool; each reads the same static inputs."""
    recorded: list[int] = []

    @contextlib.contextmanager
    def record(graph: FakeGraph, pool: object = None) -> Iterator[None]:
        FakeGraph.pools.append(pool)
        yield

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    prompts = [[5, 6], [20, 30] * 20, [(7 * n) % 200 + 4 for n in range(90)]]
    expected = [generate(Engine(short, tiny_tokenizer), prompts)]
    engine = Engine(short, tiny_tokenizer)
    graphs = engine._fused_step = DecodeGraphs(short, engine._cache)
    graphs.record()
    for size, (graph, hidden) in graphs._graphs.items():
        recorded.append(size)

        def run(size: int = size, hidden: torch.Tensor = hidden) -> None:
            hidden.copy_(graphs._forward(graphs._inputs.first(size)))

        graph.run = run  # type: ignore[attr-defined]
    assert recorded == [64, 56, 48, 40, 32, 24, 16, 8, 4, 2, 1]
    assert FakeGraph.pools == [None, *["the pool"] * 10]
    assert [generate(engine, prompts)] == expected
    replays = {size: graph.replays for size, (graph, _) in graphs._graphs.items()}  # type: ignore[attr-defined]
    assert replays[4] > 30
    assert not replays[64]


def test_a_step_is_measured(model: Any) -> None:
    make_cache = partial(PagedCache, model.config, torch.float32, torch.device("cpu"), sequences=4)
    for tokens in (1, 64, 300):
        assert chunk_bytes(model, make_cache, tokens, 4) >= 0
