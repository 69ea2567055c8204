from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scale import examples
from xverse.config import UserError, build, read_yaml
from xverse.data.mixture import BLOCK, PERIOD, Mixture, MixtureConfig, MixtureStage, Schedule
from xverse.data.order import random_order

ROOT = Path(__file__).resolve().parent.parent.parent


def sizes(count: int) -> dict[str, int]:
    return {f"s{i}": 10 for i in range(count)}


@settings(deadline=None, max_examples=examples(10))
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


@settings(deadline=None, max_examples=examples(20))
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
        (MixtureConfig({"en": 0.5, "zh": 0.4}), "the weights by source sum to 0.9, not to 1"),
        (MixtureConfig({"en": 60, "zh": 30}), "the weights by source sum to 90, not to 1"),
        (MixtureConfig(categories={"text": 0.7}), "the weights by category sum to 0.7, not to 1"),
        (MixtureConfig(categories={"txt": 1.0}), "unknown category 'txt'; did you mean 'text'"),
        (MixtureConfig(languages={"en": 0.5, "eo": 0.5}), r"unknown language 'eo' \(the data has en, zh\)"),
        (MixtureConfig({"en": 1.0}, languages={"en": 1.0}), "either weights, or categories"),
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


KINDS = {
    "web_en": ("web", "en"),
    "web_zh": ("web", "zh"),
    "books_en": ("books", "en"),
    "code_py": ("code", "py"),
}
SIZES = {"web_en": 700, "web_zh": 300, "books_en": 100, "code_py": 50}


def test_categories_and_languages() -> None:
    config = MixtureConfig(categories={"web": 70, "books": 20, "code": 10}, languages={"en": 0.6, "zh": 0.4})
    assert config.resolve(SIZES, KINDS) == pytest.approx(
        {"web_en": 42, "web_zh": 28, "books_en": 20, "code_py": 10}
    )
    config = MixtureConfig(categories={"web": 0.5, "*": 0.5}, temperature=0.0)
    assert config.resolve(SIZES, KINDS) == pytest.approx(
        {"web_en": 0.25, "web_zh": 0.25, "books_en": 0.25, "code_py": 0.25}
    )
    config = MixtureConfig(languages={"zh": 0.5, "*": 0.5}, categories={"web": 1.0, "books": 0.0})
    assert config.resolve(SIZES, KINDS) == pytest.approx(
        {"web_en": 0.5, "web_zh": 0.5, "books_en": 0, "code_py": 0}
    )


def test_the_published_mixture_is_what_was_published() -> None:
    config = MixtureConfig(file=ROOT / "recipes" / "7b" / "mixture.yaml").read()
    assert config.categories is not None
    assert config.languages is not None
    assert sum(config.categories.values()) == pytest.approx(100)
    assert len(config.languages) == 41
    kinds = {
        f"{category}_{language}": (category, language)
        for category in config.categories
        for language in (["py"] if category == "code" else config.languages)
    }
    shares = config.build(dict.fromkeys(kinds, 1000), dict.fromkeys(kinds, 9), kinds, seed=0).shares()
    assert shares["code_py"] == pytest.approx(0.0709, abs=2e-6)
    english = sum(share for name, share in shares.items() if name.endswith("_en"))
    assert english == pytest.approx(0.5491 * (1 - 0.0709), abs=2e-4)  # the languages sum to 100.02


def test_epoch_caps_give_what_they_take_to_the_others() -> None:
    config = MixtureConfig({"en": 0.5, "zh": 0.3, "ta": 0.2}, epochs={"ta": 2.0, "*": 10.0})
    lengths = {"en": 400, "zh": 400, "ta": 50}
    kinds = {name: ("text", name) for name in lengths}
    mixture = config.build(lengths, lengths, kinds, seed=0, sequences=1000)
    assert mixture.shares() == pytest.approx({"en": 0.5625, "zh": 0.3375, "ta": 0.1}, abs=2e-6)
    assert mixture.epochs(1000)["ta"] == pytest.approx(2)
    tight = MixtureConfig({"en": 0.5, "zh": 0.3, "ta": 0.2}, epochs={"*": 1.0})
    with pytest.raises(UserError, match="the caps in epochs leave too little text"):
        tight.build(lengths, lengths, kinds, seed=0, sequences=1000)
    with pytest.raises(UserError, match="unknown source 'tamil'"):
        MixtureConfig(epochs={"tamil": 1.0}).build(lengths, lengths, kinds, seed=0, sequences=10)


def staged() -> Schedule:
    config = MixtureConfig(
        {"a": 0.5, "b": 0.5}, stages=[MixtureStage({"a": 0.9, "b": 0.1}, from_step=300)], epochs={"a": 4.0}
    )
    lengths = {"a": 500, "b": 500}
    kinds = {name: ("text", name) for name in lengths}
    mixture = config.build(lengths, lengths, kinds, seed=1, sequences=4000, before=lambda step: 10 * step)
    assert isinstance(mixture, Schedule)
    return mixture


def test_stages_change_the_shares_at_their_step_and_go_on_in_the_sources() -> None:
    mixture = staged()
    found = [mixture.locate(n) for n in range(4000)]
    assert Counter(name for name, _ in found[:3000])["a"] == pytest.approx(1500, abs=2)
    # 4 epochs of 500 are 2,000 draws: 1,500 are gone, so the second part has a half, not nine tenths
    assert Counter(name for name, _ in found[3000:])["a"] == pytest.approx(500, abs=2)
    for name in "ab":
        ks = [k for source, k in found if source == name]
        assert ks == list(range(len(ks)))
    assert mixture.epochs(4000)["a"] == pytest.approx(4, abs=0.01)
    assert sum(mixture.shares().values()) == pytest.approx(1)
    assert [staged().locate(n) for n in (3999, 0, 3000)] == [found[3999], found[0], found[3000]]


def test_stages_out_of_order() -> None:
    lengths, kinds = {"a": 5}, {"a": ("text", "a")}
    late = MixtureConfig(stages=[MixtureStage(from_step=9)])
    with pytest.raises(UserError, match="after the end of the run"):
        late.build(lengths, lengths, kinds, 0, sequences=40, before=lambda step: 5 * step)
    with pytest.raises(UserError, match="stages need a pretraining recipe"):
        late.build(lengths, lengths, kinds, 0)
    twice = MixtureConfig(stages=[MixtureStage(from_step=2), MixtureStage(from_step=2)])
    with pytest.raises(UserError, match="must increase"):
        twice.build(lengths, lengths, kinds, 0, sequences=400, before=lambda step: 5 * step)


def test_a_million_simulated_sequences_have_the_expected_shares() -> None:
    mixture = Mixture({"a": 0.7, "b": 0.2999, "c": 0.0001}, {"a": 1, "b": 1, "c": 1}, seed=0)
    assert mixture.simulate() == mixture.shares()
    for count in (0, 1, 999, 1000, 123_456, 2_500_000):
        drawn = mixture.drawn(count)
        assert sum(drawn.values()) == count
        if count:
            source, k = mixture.locate(count - 1)
            assert k == drawn[source] - 1


def test_a_file_says_everything(tmp_path: Path) -> None:
    (tmp_path / "mixture.yaml").write_text("weights: {en: 0.4, zh: 0.6}\n")
    given = MixtureConfig(file=tmp_path / "mixture.yaml")
    assert given.read() == MixtureConfig({"en": 0.4, "zh": 0.6})
    with pytest.raises(UserError, match="mutually exclusive"):
        MixtureConfig(temperature=0.5, file=tmp_path / "mixture.yaml").read()


def test_absent_names_leave_their_shares_to_the_others() -> None:
    named = MixtureConfig({"zh": 0.33, "en": 0.33, "code_py": 0.03, "*": 0.31}, allow_absent=True)
    whole = {"zh": 10, "en": 10, "code_py": 10, "ar": 30, "th": 10}
    strict = MixtureConfig(named.weights)
    assert named.resolve(whole) == strict.resolve(whole)
    for data in (["zh"], ["he"], ["zh", "en"], ["he", "zh"], ["code_py", "fi", "en"], ["en", "code_py"]):
        lengths = dict.fromkeys(data, 10)
        shares = Mixture(named.resolve(lengths), lengths, 0).shares()
        assert sum(shares.values()) == pytest.approx(1)
        assert set(shares) == set(data)
        with pytest.raises(UserError, match="unknown source"):
            strict.resolve(lengths)
    with pytest.raises(UserError, match=r"'code_py' \(the data has en, zh\); remove it, or set allow_absent"):
        strict.resolve({"zh": 1, "en": 1})
    kinds = {"web_en": ("web", "en"), "books_fi": ("books", "fi")}
    sizes = {"web_en": 10, "books_fi": 30}
    categories, languages = {"web": 0.6, "books": 0.2, "code": 0.2}, {"en": 0.5, "eo": 0.5}
    mixed = MixtureConfig(categories=categories, languages=languages, allow_absent=True)
    assert mixed.resolve(sizes, kinds) == pytest.approx({"web_en": 0.75, "books_fi": 0.25})
    with pytest.raises(UserError, match="the data has none of the source names given"):
        MixtureConfig({"zh": 1.0}, allow_absent=True).resolve({"en": 1})


@pytest.mark.parametrize("languages", [["he"], ["zh"], ["zh", "en"], ["sw", "en"]])
def test_the_recipes_take_any_languages(languages: list[str]) -> None:
    for recipe in ("nano/pretrain.yaml", "7b/continue-8.yaml"):
        mixture = build(MixtureConfig, read_yaml(ROOT / "recipes" / recipe)["mixture"], recipe)
        lengths = dict.fromkeys(languages, 100)
        assert set(Mixture(mixture.resolve(lengths), lengths, 0).shares()) == set(languages)
