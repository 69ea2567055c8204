"""Log-probabilities, predictions, and that neither sharing nor batching changes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from xverse.config import UserError
from xverse.data.benchmarks.questions import Question, Subject
from xverse.eval.backends import EngineBackend, TransformersBackend
from xverse.eval.benchmarks import BENCHMARKS
from xverse.eval.run import load_benchmarks
from xverse.eval.scoring import Answer, Prompt, make_prompts, score_prompts


def plainly(backend: EngineBackend, ids: list[int], continuation: list[int]) -> float:
    """The log-probability of a continuation by one plain forward pass over everything."""
    from xverse.model.attention import FullCausal

    whole = torch.tensor([[*ids, *continuation]])
    with torch.inference_mode():
        logits = backend.engine.model(whole, FullCausal(1, whole.shape[1]))[0].float()
    logprobs = logits.log_softmax(-1)
    return sum(logprobs[len(ids) - 1 + place, token].item() for place, token in enumerate(continuation))


@pytest.fixture
def law(benchmarks: Path) -> Subject:
    (found,) = load_benchmarks(["ceval"], benchmarks)
    return found.subjects[1]


def test_scores_are_those_of_a_plain_forward_pass(engine_backend: Any, law: Subject) -> None:
    asked = make_prompts(engine_backend, BENCHMARKS["ceval"], law, 5)
    for each, found in zip(asked, score_prompts(engine_backend, asked), strict=True):
        expected = [plainly(engine_backend, each.ids, continuation) for continuation in each.continuations]
        assert found.logprobs == pytest.approx(expected, abs=1e-4)
        assert found.prediction == "ABCD"[expected.index(max(expected))]


def test_letters_are_tokens_of_the_real_prompt(engine_backend: Any, law: Subject) -> None:
    encode = engine_backend.engine.tokenizer.encode
    benchmark = BENCHMARKS["ceval"]
    for each in make_prompts(engine_backend, benchmark, law, 5):
        for letter, continuation in zip("ABCD", each.continuations, strict=True):
            assert [*each.ids, *continuation] == encode(each.prompt + letter)


def test_letters_of_several_tokens(engine_backend: Any) -> None:
    """Characters that the vocabulary lacks are bytes: the beginning that they share belongs to the prompt."""
    question = Question(id="x", text="？", options=("1", "2"), answer="A")
    subject = Subject(name="s", title="s", category="c", shots=(), questions=(question,))
    import dataclasses

    benchmark = dataclasses.replace(
        BENCHMARKS["ceval"], answer=lambda question, letter: {"A": "𠮷野", "B": "𠮸"}[letter]
    )
    (asked,) = make_prompts(engine_backend, benchmark, subject, 0)
    assert {len(each) for each in asked.continuations} != {1}
    (found,) = score_prompts(engine_backend, [asked])
    expected = [plainly(engine_backend, asked.ids, each) for each in asked.continuations]
    assert found.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["mmlu", "ceval"])
def test_sharing_the_beginning_changes_nothing(random_model: Path, benchmarks: Path, name: str) -> None:
    """Logits within 1e-4 (sums in another order), predictions equal where the margin is larger."""
    (found,) = load_benchmarks([name], benchmarks)
    sharing, alone = (
        EngineBackend.load(
            str(random_model), quantize=None, threads=1, max_cache_tokens=40_000, prefix_cache_bytes=size
        )
        for size in (2**26, 0)
    )
    for subject in found.subjects[:4]:
        asked = make_prompts(sharing, found.benchmark, subject, 5)
        pairs = zip(score_prompts(sharing, asked), score_prompts(alone, asked), strict=True)
        for one, other in pairs:
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
            best, second = sorted(other.logprobs, reverse=True)[:2]
            assert one.prediction == other.prediction or best - second < 2e-4
    assert sharing.engine.stats().reused_tokens > 0
    assert alone.engine.stats().reused_tokens == 0


def test_equal_letters_go_to_the_first() -> None:
    question = Question(id="x", text="?", options=("a", "b", "c"), answer="B")
    found = Answer(
        Prompt(question=question, prompt="", shots=0, ids=[1], continuations=[]), [-2.0, -1.0, -1.0]
    )
    assert found.prediction == "B"


def test_shots_are_dropped_until_it_fits_and_the_question_never_cut(
    engine_backend: Any, law: Subject
) -> None:
    benchmark = BENCHMARKS["ceval"]
    sizes = {count: len(make_prompts(engine_backend, benchmark, law, count)[0].ids) for count in range(6)}
    for room, count in (
        (sizes[5] + 1, 5),
        (sizes[5], 4),
        (sizes[3] + 1, 3),
        (sizes[1], 0),
        (sizes[0] + 1, 0),
    ):
        engine_backend.context = room
        first = make_prompts(engine_backend, benchmark, law, 5)[0]
        assert first.shots == count
        assert first.prompt == benchmark.prompt(law, first.question, count)
    engine_backend.context = sizes[0]
    with pytest.raises(UserError, match=r"law/0: its \d+ tokens do not fit into the model's context of"):
        make_prompts(engine_backend, benchmark, law, 5)


@pytest.mark.parametrize("share", [True, False])
def test_transformers_scores_the_same(
    random_model: Path, engine_backend: Any, benchmarks: Path, share: bool
) -> None:
    from transformers import AutoModelForCausalLM

    import xverse  # noqa: F401 - registers the Auto class

    model = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32).eval()
    backend = TransformersBackend(
        model, engine_backend.engine.tokenizer.encode, name="hf", context=8192, share=share, batch_tokens=700
    )
    (found,) = load_benchmarks(["mmlu"], benchmarks)
    for subject in found.subjects[:3]:
        asked = make_prompts(engine_backend, found.benchmark, subject, 5)
        assert make_prompts(backend, found.benchmark, subject, 5) == asked
        for one, other in zip(
            score_prompts(backend, asked), score_prompts(engine_backend, asked), strict=True
        ):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
    assert backend.shares == share


def test_transformers_continuations_of_any_length(random_model: Path, engine_backend: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32).eval()
    items = [
        (list(range(10, 60)), [[5], [6, 7, 8], [9, 9]]),
        (list(range(10, 45)), [[5], [6]]),
        (list(range(10, 40)), [[11, 12, 13, 14, 15]]),
    ]
    backend = TransformersBackend(model, lambda text: [], name="hf", context=8192)
    done: list[int] = []
    found = backend.score(items, done.append)
    assert done[-1] == 3
    for (ids, continuations), scores in zip(items, found, strict=True):
        expected = [plainly(engine_backend, ids, each) for each in continuations]
        assert scores == pytest.approx(expected, abs=1e-3)


def test_a_model_whose_cache_cannot_be_shared_computes_whole_prompts(engine_backend: Any) -> None:
    """Mamba has a state instead of a cache of keys and values."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    size = engine_backend.engine.tokenizer.vocab_size
    config = MambaConfig(vocab_size=size, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = MambaForCausalLM(config).eval()
    items = [(list(range(10, 60)), [[5], [6]]), ([*range(10, 60), 7], [[5], [6]])]
    backend = TransformersBackend(model, lambda text: [], name="mamba", context=512)
    found = backend.score(items)
    assert not backend.shares
    for (ids, continuations), scores in zip(items, found, strict=True):
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        assert scores == pytest.approx([logprobs[each[0]].item() for each in continuations], abs=1e-4)


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_an_oracle_is_always_right_and_its_contrary_never(name: str, test_data: Path, oracle: Any) -> None:
    plans = load_benchmarks([name], test_data / "eval", limit=30)
    for right in (True, False):
        backend = oracle(plans, right=right)
        for subject in plans[0].subjects:
            for each in score_prompts(backend, make_prompts(backend, plans[0].benchmark, subject, 5)):
                assert (each.prediction == each.question.answer) == right


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_random_weights_know_nothing(name: str, test_data: Path, engine_backend: Any) -> None:
    """Where a prediction does not depend on the key, the expected accuracy is Σ p(predicted) · p(key)."""
    plans = load_benchmarks([name], test_data / "eval", limit={"mmlu": 8, "ceval": 8}.get(name, 25))
    right = total = 0
    predicted: dict[str, int] = {}
    keys: dict[str, int] = {}
    for subject in plans[0].subjects:
        for each in score_prompts(
            engine_backend, make_prompts(engine_backend, plans[0].benchmark, subject, 1)
        ):
            total += 1
            right += each.prediction == each.question.answer
            predicted[each.prediction] = predicted.get(each.prediction, 0) + 1
            assert each.question.answer is not None
            keys[each.question.answer] = keys.get(each.question.answer, 0) + 1
    expected = sum(count * keys.get(letter, 0) for letter, count in predicted.items()) / total**2
    sigma = math.sqrt(expected * (1 - expected) / total)
    assert abs(right / total - expected) < 3 * sigma
