"""A constraint restricts its request and does not affect others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xverse.engine import Engine, Event, Request, SamplingParams, Speculation

GREEDY = SamplingParams(temperature=0)
NEVER = (10**6,)


class Given:
    """Allows exactly one text, token by token, and then an end token."""

    size: int  # of the vocabulary

    def __init__(self, tokens: list[int]) -> None:
        self.left = list(tokens)

    def allowed(self) -> torch.Tensor:
        allowed = torch.zeros(self.size, dtype=torch.bool)
        allowed[self.left[0] if self.left else 3] = True
        return allowed

    def accept(self, token_id: int) -> None:
        if self.left:
            assert self.left.pop(0) == token_id

    def forced(self) -> list[int]:
        return []


class Broken(Given):
    def accept(self, token_id: int) -> None:
        super().accept(token_id)
        if not self.left:
            raise RuntimeError("the grammar is at its end")


class Nothing(Given):
    def allowed(self) -> torch.Tensor:
        return torch.zeros(self.size, dtype=torch.bool)


@pytest.fixture(autouse=True)
def vocabulary(tiny_tokenizer: Any) -> None:
    Given.size = tiny_tokenizer.vocab_size


def run(engine: Engine, *requests: Request) -> list[list[Event]]:
    handles = [engine.submit(request) for request in requests]
    found: dict[int, list[Event]] = {handle: [] for handle in handles}
    while engine.busy:
        for event in engine.step():
            found[event.handle].append(event)
    return list(found.values())


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(seed=1, top_k=5, repetition_penalty=1.5)])
@pytest.mark.parametrize("speculation", [None, Speculation()])
def test_only_what_is_allowed_is_said(
    model: Any, tiny_tokenizer: Any, naive: Any, sampling: SamplingParams, speculation: Speculation | None
) -> None:
    text = [30, 40, 50, 60] * 5
    engine = Engine(model, tiny_tokenizer, speculation=speculation)
    forced = Request(prompt_ids=[30, 40, 50, 60], sampling=sampling, constraint=Given(text))
    free = Request(prompt_ids=[9, 8], sampling=SamplingParams.greedy(12), stop_ids=NEVER)
    events, others = run(engine, forced, free)
    assert [event.token_id for event in events] == [*text, 3]
    assert events[-1].finish_reason == "stop"
    assert [event.token_id for event in others] == naive(model, [9, 8], 12)
    assert (engine.stats().accepted_tokens > 0) == (speculation is not None)


@pytest.mark.parametrize(
    ("constraint", "message", "said"),
    [(Broken([30, 40]), "the grammar is at its end", [30]), (Nothing([]), "every token is forbidden", [])],
)
def test_its_failure_is_its_own(
    model: Any, tiny_tokenizer: Any, naive: Any, constraint: Given, message: str, said: list[int]
) -> None:
    engine = Engine(model, tiny_tokenizer, prefix_cache_bytes=0)
    failing = Request(prompt_ids=[5, 6], sampling=GREEDY, constraint=constraint)
    healthy = Request(prompt_ids=[9, 8], sampling=SamplingParams.greedy(12), stop_ids=NEVER)
    events, others = run(engine, failing, healthy)
    assert [event.token_id for event in events] == [*said, None]
    assert events[-1].finish_reason == "error"
    assert events[-1].error == message
    assert [event.token_id for event in others] == naive(model, [9, 8], 12)
    assert engine.stats().free_blocks == engine.stats().blocks


def test_what_runs_can_be_failed_and_what_waits_goes_on(model: Any, tiny_tokenizer: Any) -> None:
    engine = Engine(model, tiny_tokenizer, max_batch=2, prefix_cache_bytes=0)
    request = Request(prompt_ids=[5, 6], sampling=SamplingParams.greedy(3), stop_ids=NEVER)
    handles = [engine.submit(request) for _ in range(3)]
    engine.step()
    events = engine.fail("the machine is on fire")
    assert [event.handle for event in events] == handles[:2]
    assert {event.error for event in events} == {"the machine is on fire"}
    said = []
    while engine.busy:
        said += engine.step()
    assert [event.handle for event in said] == handles[2:] * 3
    assert engine.stats().free_blocks == engine.stats().blocks
