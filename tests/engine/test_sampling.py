from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from xverse.config import UserError
from xverse.engine import Request, SamplingParams
from xverse.engine import sampling as sampling_module
from xverse.engine.sampling import (
    UNDECIDED,
    Adjustment,
    Dice,
    adjust_,
    all_candidates,
    candidates,
    draw,
    greedy,
    is_greedy,
    redraw,
)

VOCAB = 500


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)) * 4  # [V]


def filtered(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Scores [G, V], -inf for excluded tokens."""
    scores, ids, exact = candidates(logits, sampling)
    found = torch.full(logits.shape, -torch.inf)
    found = scores if ids is None else found.scatter(-1, ids, scores)
    for row in [] if exact is None else (~exact).nonzero().flatten().tolist():
        scores, ids = all_candidates(logits[row : row + 1], sampling)
        found[row] = torch.full_like(logits[row], -torch.inf).scatter(-1, ids[0], scores[0])
    return found


def theirs(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    import transformers

    warpers: list[Any] = [transformers.TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_k:
        warpers.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(transformers.MinPLogitsWarper(sampling.min_p))
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    return transformers.LogitsProcessorList(warpers)(ids, logits.clone())


@pytest.mark.parametrize("size", [7, 500, 5000])
@pytest.mark.parametrize("spread", [0.2, 4.0])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(temperature=0.3),
        *(SamplingParams(top_k=k, temperature=0.7) for k in (1, 30, 5000)),
        *(SamplingParams(top_p=p, temperature=1.5) for p in (0.05, 0.5, 0.9, 0.999)),
        *(SamplingParams(min_p=p) for p in (0.01, 0.3, 1.0)),
        SamplingParams(temperature=0.5, top_k=30, top_p=0.85, min_p=0.05),
    ],
)
def test_filters_are_transformers_definitions(size: int, spread: float, sampling: SamplingParams) -> None:
    logits = torch.randn(4, size, generator=torch.Generator().manual_seed(size)) * spread
    logits[1] = logits[1].round()  # ties
    logits[2, : size // 2] = -torch.inf
    if sampling.top_p < 1:
        logits[1] = logits[1] + torch.arange(size) * 1e-4  # ties at the edge are not defined
    ours, expected = filtered(logits, sampling), theirs(logits.double(), sampling)
    assert torch.equal(ours > -torch.inf, expected > -torch.inf)
    torch.testing.assert_close(ours.softmax(-1), expected.softmax(-1).float())


@pytest.mark.parametrize("penalty", [0.7, 1.1, 2.0])
def test_repetition_penalty_is_transformers_definition(logits: torch.Tensor, penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    sampling = SamplingParams(repetition_penalty=penalty)
    adjustment = Adjustment(sampling, [3, 5, 5])
    for token in (499, 3):
        adjustment.add(token)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([[3, 5, 5, 499, 3]]), logits[None].clone()
    )
    adjust_(logits[None], sampling, [adjustment])
    torch.testing.assert_close(logits[None], expected)


def test_penalties_and_biases_are_openai_definition(logits: torch.Tensor) -> None:
    """Each score falls by count · frequency + (count > 0) · presence, counted in the reply alone."""
    sampling = SamplingParams(presence_penalty=0.5, frequency_penalty=-1.5, logit_bias={3: 7.0, 499: -100})
    adjustment = Adjustment(sampling, [8, 8, 9])
    expected = logits.clone()
    expected[3] += 7
    expected[499] -= 100
    counts = {3: 1, 5: 3} | dict.fromkeys(range(100, 300), 1)  # more than its initial capacity
    for token, count in counts.items():
        for _ in range(count):
            adjustment.add(token)
        expected[token] -= 0.5 + count * -1.5
    adjust_(logits[None], sampling, [adjustment])
    torch.testing.assert_close(logits, expected)


def test_nothing_to_adjust() -> None:
    assert not Adjustment(SamplingParams(temperature=0.3, top_k=5), [1, 2])


def chosen(logits: torch.Tensor, sampling: SamplingParams, seeds: list[int]) -> list[int]:
    if is_greedy(sampling):
        return greedy(logits).tolist()
    dice = [Dice(seed)[0] for seed in seeds]
    tokens = draw(logits, sampling, dice).tolist()
    return [
        redraw(row, sampling, die) if token == UNDECIDED else token
        for row, token, die in zip(logits, tokens, dice, strict=True)
    ]


@pytest.mark.parametrize("values", [{"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.5}])
def test_nothing_left_to_choose(values: dict[str, Any]) -> None:
    logits = torch.full((2, VOCAB), -torch.inf)
    logits[1, 7] = 1.0
    assert chosen(logits, SamplingParams(**values), [0, 0]) == [-1, 7]


@pytest.mark.parametrize("values", [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.01}])
def test_a_row_alone_or_among_others_is_drawn_alike(values: dict[str, Any]) -> None:
    sampling = SamplingParams(**values)
    logits = torch.randn(16, 3000, generator=torch.Generator().manual_seed(0)) * 2
    logits[::3] = logits[::3].round()  # ties; a wide nucleus
    seeds = list(range(16))
    together = chosen(logits, sampling, seeds)
    assert together == [chosen(logits[row : row + 1], sampling, seeds[row : row + 1])[0] for row in range(16)]


def test_rows_are_adjusted_together_as_each_alone() -> None:
    sampling = SamplingParams(temperature=0, repetition_penalty=1.3, frequency_penalty=0.4)
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0)).mul(4)
    adjustments = [Adjustment(sampling, list(range(4, 10 * row))) for row in range(5)]
    for token in (1, 8, 8, 77):
        adjustments[3].add(token)
    together = logits.clone()
    adjust_(together, sampling, adjustments)
    for row, adjustment in enumerate(adjustments):
        alone = logits[row : row + 1].clone()
        adjust_(alone, sampling, [adjustment])
        assert torch.equal(alone[0], together[row])
    assert not torch.equal(together, logits)


def test_tokens_of_a_proposal_count_as_if_they_were_added() -> None:
    sampling = SamplingParams(repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.4)
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0)).mul(4)
    before, after = Adjustment(sampling, [4, 5]), Adjustment(sampling, [4, 5])
    for token in (9, 4):
        before.add(token)
        after.add(token)
    for token in (4, 7, 7, 9):
        after.add(token)
    expected, found = logits.clone(), logits.clone()
    adjust_(expected, sampling, [after, before])
    adjust_(found, sampling, [before, before], [[4, 7, 7, 9], []])
    assert torch.equal(found, expected)


def test_dice_are_those_of_single_draws() -> None:
    dice, generator = Dice(5), torch.Generator().manual_seed(5)
    expected = [torch.rand(1, generator=generator).item() for _ in range(200)]
    found = []
    for index in range(100):
        found.append(dice[0])
        assert dice[3] == expected[index + 3]
        dice.use(1)
    assert found == expected[:100]


def test_tiny_temperatures_do_not_overflow(logits: torch.Tensor) -> None:
    best = int(logits.argmax())
    assert chosen(logits[None] * 1e30, SamplingParams(temperature=1e-4), [0]) == [best]
    assert chosen(logits[None], SamplingParams(temperature=1e-9), [0]) == [best]


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(top_k=4), SamplingParams(top_p=0.9999)]
)
def test_draws_follow_the_distribution(sampling: SamplingParams) -> None:
    logits = torch.tensor([[0.5, 0.2, 0.3, 0.0]]).log()
    dice = Dice(1)
    counts = [0] * 4
    for token in draw(logits.expand(4000, 4), sampling, [dice[index] for index in range(4000)]).tolist():
        counts[token] += 1
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
        ("max_new_tokens", 0),
        ("max_new_tokens", -5),
        ("max_new_tokens", 1.5),
        ("stop", "Human:"),
        ("stop", [""]),
    ],
)
def test_sampling_values_out_of_range_are_named(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"), [("prompt_ids", []), ("logprobs", -1), ("logprobs", 21), ("prompt_logprobs", True)]
)
def test_request_values_out_of_range_are_named(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=field):
        Request(**{"prompt_ids": [5], field: value})


@pytest.mark.parametrize("count", [1, 255, 256, 257, 700, 1024])
def test_sums_by_blocks_draw_the_same(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at the ends of blocks, with weights of 0 and at both ends of the dice."""
    generator = torch.Generator().manual_seed(count)
    scores = torch.randn(200, count, generator=generator) * 4
    scores[torch.rand(scores.shape, generator=generator) < 0.3] = -math.inf
    scores[:, -1] = scores[:, -1].clamp(min=-9)
    dice = torch.rand(200, dtype=torch.float64, generator=generator)
    dice[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    whole = sampling_module._drawn(scores, None, dice)
    monkeypatch.setattr(sampling_module, "_FEW", 0)
    blocks = sampling_module._drawn(scores, None, dice)
    assert (whole != blocks).sum() <= 1  # rounding may decide a draw between two
    assert (scores.gather(-1, blocks[:, None]) > -math.inf).all()
