from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xverse.config import UserError
from xverse.data.mixture import BLOCK, PERIOD, Mixture, MixtureConfig
from xverse.data.order import random_order


def sizes(count: int) -> dict[str, int]:
    return {f"s{i}": 10 for i in range(count)}


@settings(deadline=None, max_examples=10)
@given(
    weights=st.lists(st.floats(0.001, 1), min_size=1, max_size=45),
    seed=st.integers(0, 9),
    start=st.integers(0, 3 * PERIOD),
)
def test_shares_are_exact_in_the_long_run_and_near_in_every_block(
    weights: list[float], seed: int, start: int
) -> None:
    named = {f"s{i}": weight for i, weight in enumerate(weights)}
    mixture = Mixture(named, sizes(len(weights)), seed)
    total = sum(weights)
    for name, weight in named.items():
        assert mixture.shares()[name] * PERIOD == pytest.approx(weight / total * PERIOD, abs=1)
    first = start // BLOCK * BLOCK
    drawn = Counter(mixture.locate(n)[0] for n in range(first, first + BLOCK))
    for name, weight in named.items():
        assert abs(drawn[name] - BLOCK * weight / total) <= 1 + len(weights) / 2


def test_the_k_th_draws_count_up_without_a_gap() -> None:
    mixture = Mixture({"a": 5, "b": 3, "c": 0.01}, {"a": 1, "b": 1, "c": 1}, seed=4)
    next_of: Counter[str] = Counter()
    for n in range(5 * BLOCK):
        source, k = mixture.locate(n)
        assert k == next_of[source]
        next_of[source] += 1
    # and the second period goes on where the first ends
    counts = {name: round(share * PERIOD) for name, share in mixture.shares().items()}
    firsts = {}
    for n in range(PERIOD, PERIOD + 3 * BLOCK):
        firsts.setdefault(*mixture.locate(n))
    assert all(firsts[name] == counts[name] for name in ("a", "b"))


def test_a_whole_period_has_exactly_the_shares() -> None:
    mixture = Mixture({"a": 1, "b": 1, "c": 1}, sizes(0) | {"a": 1, "b": 1, "c": 1}, seed=0)
    drawn: Counter[str] = Counter()
    for n in range(0, PERIOD, BLOCK):
        slots, _ = mixture._block(n // BLOCK)
        drawn.update({mixture.names[i]: int(c) for i, c in enumerate(np.bincount(slots))})
    assert drawn == Counter({"a": 333_334, "b": 333_333, "c": 333_333})


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 10**10), min_size=1, max_size=20))
def test_random_access_equals_a_fresh_mixture(places: list[int]) -> None:
    weights = {"en": 0.5, "zh": 0.3, "ta": 0.2}
    size = dict.fromkeys(weights, 10)
    used = Mixture(weights, size, seed=1)
    answers = [used.locate(n) for n in places]
    fresh = Mixture(weights, size, seed=1)
    assert [fresh.locate(n) for n in reversed(places)] == answers[::-1]


def test_the_seed_changes_the_order_but_not_the_counts() -> None:
    weights = {"en": 0.5, "zh": 0.5}
    one, two = (Mixture(weights, {"en": 1, "zh": 1}, seed) for seed in (1, 2))
    first = [one.locate(n)[0] for n in range(BLOCK)]
    second = [two.locate(n)[0] for n in range(BLOCK)]
    assert first != second
    assert Counter(first) == Counter(second) == Counter({"en": 500, "zh": 500})


def test_a_tiny_weight_is_drawn_once_in_a_million_rather_than_never() -> None:
    assert Mixture({"en": 1, "ta": 1e-12}, {"en": 1, "ta": 1}, 0).shares()["ta"] == 1e-6


def test_others_share_by_size_and_temperature() -> None:
    size = {"en": 100, "a": 100, "b": 400}
    assert MixtureConfig({"en": 0.4, "*": 0.6}, 0.5).resolve(size) == pytest.approx(
        {"en": 0.4, "a": 0.2, "b": 0.4}
    )
    assert MixtureConfig({"en": 1.0}).resolve(size) == {"en": 1.0, "a": 0.0, "b": 0.0}
    assert MixtureConfig(None, 0.0).resolve(size) == pytest.approx({"en": 1 / 3, "a": 1 / 3, "b": 1 / 3})
    assert MixtureConfig().resolve(size) == pytest.approx({"en": 1 / 6, "a": 1 / 6, "b": 4 / 6})
    percent = {"en": 25.0, "a": 25.0, "b": 25.0, "*": 25.0}
    assert MixtureConfig(percent).resolve(size) == {"en": 25, "a": 25, "b": 25}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MixtureConfig({"eng": 1.0}), "unknown source 'eng'; did you mean 'en'"),
        (MixtureConfig({"zh": -1.0, "en": 1.0}), "the weight of 'zh' is -1.0"),
        (MixtureConfig({"zh": float("nan")}), "the weight of 'zh' is nan"),
        (MixtureConfig({"zh": 0.0, "*": 0.0}), "every weight is zero"),
        (MixtureConfig(None, 2.0), "temperature 2.0 is not between 0 and 1"),
    ],
)
def test_impossible_weights_are_refused(config: MixtureConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.resolve({"en": 5, "zh": 5})


def test_it_says_what_it_is() -> None:
    mixture = Mixture({f"s{i}": 1 for i in range(8)}, sizes(8), 0)
    assert str(mixture).startswith("mixture of 8 sources (s0 12.5 %")
    assert str(mixture).endswith("3 others 37.5 %)")
    assert mixture.epochs(800)["s0"] == pytest.approx(10)


def test_orders_are_permutations_and_stay_as_they_are() -> None:
    assert sorted(random_order(100, "x", 1).tolist()) == list(range(100))
    # Pinned: a change here would change the data order of every run that is resumed.
    assert random_order(8, "x", 1).tolist() == [5, 3, 7, 4, 0, 1, 2, 6]
