"""From questions to predictions: prompts that fit, the letters' tokens, their log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from xverse.config import UserError
from xverse.data.benchmarks.questions import Question, Subject
from xverse.eval.benchmark import Benchmark

Item = tuple[list[int], list[list[int]]]  # a prompt and its continuations


class Backend(Protocol):
    """A model that scores. ``context``: tokens of a prompt with its continuation."""

    name: str
    context: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids that the model reads for each text, with what its family puts before any text."""
        ...

    def score(
        self, items: Sequence[Item], progress: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        """The log-probability of every continuation, summed over its tokens."""
        ...


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question as the model gets it."""

    question: Question
    prompt: str
    shots: int
    ids: list[int]
    continuations: list[list[int]]  # one for each of the question's letters


@dataclass(frozen=True, kw_only=True)
class Answered:
    """``logprobs``: one natural log-probability for each letter, in their order."""

    question: Question
    prompt: str
    shots: int
    tokens: int
    logprobs: tuple[float, ...]

    @property
    def prediction(self) -> str:
        """The likeliest letter; of equally likely ones the first."""
        best = max(self.logprobs)
        return self.question.letters[self.logprobs.index(best)]


def ask(backend: Backend, benchmark: Benchmark, subject: Subject, shots: int) -> list[Asked]:
    """The prompts of a subject's questions. Shots are dropped from the end until a prompt fits; the question
    is never cut. Raises UserError for one that does not fit without any shots."""
    prompts = [benchmark.prompt(subject, question, shots) for question in subject.questions]
    found = _tokenised(backend, benchmark, subject.questions, prompts)
    asked = []
    for question, prompt, (ids, continuations) in zip(subject.questions, prompts, found, strict=True):
        count = min(shots, len(subject.shots))
        while not _fits(backend, ids, continuations):
            if count == 0:
                raise UserError(
                    f"{benchmark.name}, {question.id}: its {len(ids)} tokens do not fit into the model's "
                    f"context of {backend.context}, even without examples"
                )
            count -= 1
            prompt = benchmark.prompt(subject, question, count)
            ((ids, continuations),) = _tokenised(backend, benchmark, [question], [prompt])
        asked.append(
            Asked(question=question, prompt=prompt, shots=count, ids=ids, continuations=continuations)
        )
    return asked


def answers(
    backend: Backend, asked: Sequence[Asked], progress: Callable[[int], None] | None = None
) -> list[Answered]:
    """In the order of ``asked``; short prompts first, as those of one length are computed together."""
    order = sorted(range(len(asked)), key=lambda index: len(asked[index].ids))
    items = [(asked[index].ids, asked[index].continuations) for index in order]
    scores = dict(zip(order, backend.score(items, progress), strict=True))
    return [
        Answered(
            question=each.question,
            prompt=each.prompt,
            shots=each.shots,
            tokens=len(each.ids),
            logprobs=tuple(scores[index]),
        )
        for index, each in enumerate(asked)
    ]


def _tokenised(
    backend: Backend, benchmark: Benchmark, questions: Sequence[Question], prompts: Sequence[str]
) -> list[Item]:
    """Where the answers' tokens begin is found in the ids of prompt and answer together: a blank or a colon
    may become one token with the letter."""
    texts = [
        prompt + benchmark.answer(question, letter)
        for question, prompt in zip(questions, prompts, strict=True)
        for letter in question.letters
    ]
    encoded = iter(backend.encode(texts))
    return [_divided([next(encoded) for _ in question.letters]) for question in questions]


def _divided(encoded: Sequence[list[int]]) -> Item:
    """What the texts' ids have in common, and how each goes on."""
    shortest = min(len(ids) for ids in encoded)
    first = encoded[0]
    common = shortest - 1  # something is left of each
    while any(ids[:common] != first[:common] for ids in encoded):
        common -= 1
    assert common > 0, "answers that have nothing in common"
    return first[:common], [ids[common:] for ids in encoded]


def _fits(backend: Backend, ids: list[int], continuations: Iterable[list[int]]) -> bool:
    return len(ids) + max(map(len, continuations)) <= backend.context
