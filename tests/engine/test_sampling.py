from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from xverse.config import UserError
from xverse.engine import Request, Sampling
from xverse.engine.sampling import (
    Counts,
    choose,
    min_p,
    repetition_penalty,
    samplers,
    temperature,
    top_k,
    top_p,
)

VOCAB = 500


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)) * 4  # [V]


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_is_transformers_definition(logits: torch.Tensor, p: float) -> None:
    from transformers import TopPLogitsWarper

    expected = TopPLogitsWarper(p)(torch.zeros(1, 1, dtype=torch.long), logits[None])[0]
    assert torch.equal(top_p(p)(logits), expected)


@pytest.mark.parametrize("k", [1, 7, VOCAB, 10 * VOCAB])
def test_top_k_is_transformers_definition(logits: torch.Tensor, k: int) -> None:
    from transformers import TopKLogitsWarper

    expected = TopKLogitsWarper(k)(torch.zeros(1, 1, dtype=torch.long), logits[None])[0]
    assert torch.equal(top_k(k)(logits), expected)


@pytest.mark.parametrize("p", [0.01, 0.3, 1.0])
def test_min_p_is_transformers_definition(logits: torch.Tensor, p: float) -> None:
    from transformers import MinPLogitsWarper

    expected = MinPLogitsWarper(p)(torch.zeros(1, 1, dtype=torch.long), logits[None])[0]
    assert torch.equal(min_p(p)(logits), expected)


def test_penalties_and_biases_are_openai_definition(logits: torch.Tensor) -> None:
    """Each score falls by count · frequency + (count > 0) · presence, counted in the reply alone."""
    sampling = Sampling(
        temperature=0, presence_penalty=0.5, frequency_penalty=-1.5, logit_bias={3: 7.0, 499: -100}
    )
    counts = Counts(sampling, [8, 8, 9], VOCAB, torch.device("cpu"))
    expected = logits.clone()
    expected[3] += 7
    expected[499] -= 100
    for token, count in ((3, 1), (5, 3)):
        for _ in range(count):
            counts.add(token)
        expected[token] -= 0.5 + count * -1.5
    changed = logits
    for step in samplers(sampling, counts):
        changed = step(changed)
    torch.testing.assert_close(changed, expected)


def test_nothing_left_to_choose_is_an_error() -> None:
    nothing = torch.full((VOCAB,), -torch.inf)
    for generator in (None, torch.Generator()):
        with pytest.raises(ValueError, match="every token is forbidden"):
            choose(nothing, [], generator)


@pytest.mark.parametrize("penalty", [0.7, 1.1, 2.0])
def test_repetition_penalty_is_transformers_definition(logits: torch.Tensor, penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    ids = torch.tensor([3, 5, 5, 499])
    seen = torch.zeros(VOCAB, dtype=torch.bool)
    seen[ids] = True
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids[None], logits[None].clone())[0]
    torch.testing.assert_close(repetition_penalty(penalty, seen)(logits), expected)


def test_all_steps_together_are_transformers_order(logits: torch.Tensor) -> None:
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    ids = logits.topk(20).indices
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.1),
            TemperatureLogitsWarper(0.5),
            TopKLogitsWarper(30),
            TopPLogitsWarper(0.85),
            MinPLogitsWarper(0.05),
        ]
    )
    expected = theirs(ids[None], logits[None].clone())[0].softmax(-1)
    ours = logits
    sampling = Sampling(temperature=0.5, top_k=30, top_p=0.85, min_p=0.05, repetition_penalty=1.1)
    for step in samplers(sampling, Counts(sampling, ids.tolist(), VOCAB, torch.device("cpu"))):
        ours = step(ours)
    torch.testing.assert_close(ours.softmax(-1), expected)


def test_top_p_keeps_at_least_one_and_respects_what_top_k_removed() -> None:
    logits = torch.tensor([1.0, 5.0, 4.9, -torch.inf])
    assert top_p(1e-6)(logits).isfinite().tolist() == [False, True, False, False]
    assert top_p(0.99)(logits).isfinite().tolist() == [False, True, True, False]


def test_tiny_temperatures_do_not_overflow(logits: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    steps = [temperature(1e-4)]
    assert choose(logits * 1e30, steps, generator) == int(logits.argmax())
    sampling = Sampling(temperature=1e-9)
    assert samplers(sampling, Counts(sampling, [3], VOCAB, torch.device("cpu"))) == []


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.2, 0.3, 0.0]).log()
    generator = torch.Generator().manual_seed(1)
    counts = [0] * 4
    for _ in range(4000):
        counts[choose(logits, [], generator)] += 1
    assert counts[3] == 0
    for count, probability in zip(counts, (0.5, 0.2, 0.3), strict=False):
        assert abs(count / 4000 - probability) < 5 * math.sqrt(probability * (1 - probability) / 4000)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", 2.5),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("presence_penalty", 3),
        ("frequency_penalty", -2.5),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {5: 101.0}),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e9),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_sampling_values_out_of_range_are_named(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=field):
        Sampling(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_ids", []),
        ("max_new_tokens", 0),
        ("max_new_tokens", -5),
        ("max_new_tokens", 1.5),
        ("logprobs", -1),
        ("logprobs", 21),
        ("prompt_logprobs", True),
        ("stop", "Human:"),
        ("stop", [""]),
    ],
)
def test_request_values_out_of_range_are_named(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=field):
        Request(**{"prompt_ids": [5], field: value})
