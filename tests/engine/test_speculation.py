"""Speculation changes when tokens are generated, never which."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xverse.config import UserError
from xverse.engine import Engine, Request, SamplingParams, Speculation
from xverse.engine.proposers import _Ngrams
from xverse.engine.speculation import best_count
from xverse.model.transformer import XverseForCausalLM, init_weights

GREEDY = SamplingParams(temperature=0)
NEVER = (10**6,)


def ask(engine: Engine, prompt: list[int], new_tokens: int, sampling: SamplingParams) -> list[int | None]:
    request = Request(
        prompt_ids=prompt, sampling=dataclasses.replace(sampling, max_new_tokens=new_tokens), stop_ids=NEVER
    )
    return [event.token_id for event in engine.stream(request)]


def guessing(model: Any, tokenizer: Any, kind: Speculation | None, prefill_chunk: int = 512) -> Engine:
    """An engine that considers proposals cheap; it would never use a draft as large as the model."""
    engine = Engine(model, tokenizer, speculation=kind, prefill_chunk=prefill_chunk)
    if engine._speculator is not None:
        engine._speculator.proposer.cost = 0.03
        engine._speculator._second_row = 0.0
    return engine


@pytest.fixture
def close_draft(model: Any) -> Any:
    """A model that agrees with ``model`` often, but not always."""
    other = XverseForCausalLM(model.config)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in other.parameters():
            parameter += 0.03 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return other


def test_lookup_finds_what_followed_before() -> None:
    ngrams = _Ngrams((4, 2))
    text = [1, 2, 3, 4, 5, 6, 1, 2]
    assert ngrams.continuation(text, 3) == [3, 4, 5]
    text += [3, 4]
    assert ngrams.continuation(text, 2) == [5, 6]  # four in a row
    assert ngrams.continuation(text, 9) == [5, 6, 1, 2, 3, 4, 5, 6, 1]  # beyond the end it repeats
    text += [9]
    assert ngrams.continuation(text, 3) == []
    assert _Ngrams((2,)).continuation([7, 7, 7], 2) == [7, 7]
    assert _Ngrams((4, 2)).continuation([7], 2) == []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 8))
def test_lookup_is_right_at_any_size(text: list[int], count: int) -> None:
    """Grown step by step or at once, the continuation follows the latest, longest earlier n-gram."""
    grown = _Ngrams((4, 2))
    for end in range(1, len(text) + 1):
        found = grown.continuation(text[:end], count)
    wanted: list[int] = []
    for size in (4, 2):
        ends = [at for at in range(size, len(text)) if text[at - size : at] == text[-size:]]
        if ends and len(text) > size:
            follows = text[ends[-1] :]
            wanted = [follows[index % len(follows)] for index in range(count)]
            break
    assert found == wanted == _Ngrams((4, 2)).continuation(text, count)


def test_the_number_of_guesses_follows_what_they_bring() -> None:
    assert best_count(0.0, 0.02, 7) == 0
    assert best_count(1.0, 0.02, 7) == 7
    assert best_count(0.5, 1.0, 7) == 0  # a proposal that costs a whole step
    chosen = [best_count(rate / 20, 0.1, 15) for rate in range(21)]
    assert chosen == sorted(chosen)
    assert 0 < chosen[10] < 15


def test_lookup_gives_the_same_tokens_in_fewer_steps(model: Any, tiny_tokenizer: Any, naive: Any) -> None:
    prompt = [20, 30, 40, 50, 60] * 6
    wanted = naive(model, prompt, 60)
    engine = Engine(model, tiny_tokenizer, speculation=Speculation())
    handle = engine.submit(
        Request(prompt_ids=prompt, sampling=SamplingParams.greedy(60), stop_ids=NEVER, logprobs=0)
    )
    steps, got = 0, []
    while engine.busy:
        steps += 1
        got += engine.step()
    assert [event.token_id for event in got] == wanted
    assert {event.handle for event in got} == {handle}
    stats = engine.stats()
    assert 0 < stats.accepted_tokens <= stats.proposed_tokens
    assert steps == 60 - stats.accepted_tokens
    plain = list(
        Engine(model, tiny_tokenizer).stream(
            Request(prompt_ids=prompt, sampling=SamplingParams.greedy(60), stop_ids=NEVER, logprobs=0)
        )
    )
    for one, other in zip(got, plain, strict=True):
        assert one.logprob is not None
        assert other.logprob is not None
        assert one.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-4)


def test_a_draft_gives_the_same_tokens(model: Any, close_draft: Any, tiny_tokenizer: Any, naive: Any) -> None:
    speculation = Speculation(draft=close_draft, draft_tokenizer=tiny_tokenizer)
    engine = guessing(model, tiny_tokenizer, speculation, prefill_chunk=9)
    prompts = [[5, 6, 7], [(3 * n) % 100 + 4 for n in range(50)]]
    handles = [
        engine.submit(Request(prompt_ids=prompt, sampling=SamplingParams.greedy(50), stop_ids=NEVER))
        for prompt in prompts
    ]
    got: dict[int, list[int | None]] = {handle: [] for handle in handles}
    while engine.busy:
        for event in engine.step():
            got[event.handle].append(event.token_id)
    assert list(got.values()) == [naive(model, prompt, 50) for prompt in prompts]
    stats = engine.stats()
    assert 0 < stats.accepted_tokens < stats.proposed_tokens
    assert engine._speculator is not None
    assert len(engine._speculator.proposer._cache.free_rows) == engine.max_batch  # type: ignore[attr-defined]


def test_a_draft_of_a_short_context_stops_guessing(model: Any, tiny_tokenizer: Any, naive: Any) -> None:
    short = XverseForCausalLM(dataclasses.replace(model.config, max_position_embeddings=64))
    init_weights(short, seed=2)
    engine = guessing(model, tiny_tokenizer, Speculation(draft=short, draft_tokenizer=tiny_tokenizer))
    assert ask(engine, [5] * 40, 60, GREEDY) == naive(model, [5] * 40, 60)


def test_seeded_draws_are_the_same(model: Any, close_draft: Any, tiny_tokenizer: Any) -> None:
    """A proposed token is verified by the same draw that is made without speculation."""
    kinds = [None, Speculation(), Speculation(draft=close_draft, draft_tokenizer=tiny_tokenizer)]
    for seed in range(3):
        sampling = SamplingParams(seed=seed, temperature=0.6, top_k=20, repetition_penalty=1.05)
        found = [ask(guessing(model, tiny_tokenizer, kind), [20, 30] * 10, 40, sampling) for kind in kinds]
        assert found[0] == found[1] == found[2]


@pytest.mark.thorough
def test_the_distribution_of_draws_is_preserved(model: Any, close_draft: Any, tiny_tokenizer: Any) -> None:
    """Frequencies of three tokens after a prompt, with and without speculation: chi-squared."""
    from collections import Counter

    with torch.no_grad():
        model.lm_head.weight.mul_(0.25)  # so that several tokens are probable
        close_draft.lm_head.weight.mul_(0.25)
    draws = 1000
    kinds = [None, Speculation(draft=close_draft, draft_tokenizer=tiny_tokenizer)]
    counts: list[Counter[tuple[int | None, ...]]] = []
    accepted = 0
    for kind in kinds:
        engine = guessing(model, tiny_tokenizer, kind)
        requests = [
            Request(
                prompt_ids=[20, 30, 40],
                sampling=SamplingParams(max_new_tokens=3, seed=1000 * (kind is None) + number, top_k=3),
                stop_ids=NEVER,
            )
            for number in range(draws)
        ]
        said: dict[int, list[int | None]] = {}
        for request in requests:  # one at a time: with many rows nothing is proposed
            for event in engine.stream(request):
                said.setdefault(event.handle, []).append(event.token_id)
        counts.append(Counter(tuple(each) for each in said.values()))
        accepted = engine.stats().accepted_tokens
    assert accepted > draws / 5
    statistic, cells = 0.0, 0
    for key in counts[0].keys() | counts[1].keys():
        one, other = counts[0][key], counts[1][key]
        statistic += (one - other) ** 2 / (one + other)
        cells += 1
    assert cells > 5
    # If both are equal, the statistic has mean cells - 1 and twice that as variance.
    assert statistic < cells - 1 + 4 * (2 * (cells - 1)) ** 0.5


def test_what_cannot_guess_is_refused(model: Any, tiny_tokenizer: Any, nano_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="max_tokens: 0 is out of range"):
        Speculation(max_tokens=0)
    with pytest.raises(UserError, match="give both the draft model"):
        Speculation(draft=model)
    speculation = Speculation(draft=model, draft_tokenizer=nano_tokenizer)
    with pytest.raises(UserError, match="draft: its tokenizer"):
        Engine(model, tiny_tokenizer, speculation=speculation)


@pytest.fixture
def nano_tokenizer() -> Any:
    from xverse.formats import load_tokenizer, resolve

    return load_tokenizer(resolve("nano"))
