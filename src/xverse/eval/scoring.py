"""From questions to predictions: prompts that fit, the tokens of the letters, and their log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from xverse.config import UserError
from xverse.data.benchmarks.questions import Question, Subject
from xverse.eval.benchmark import Benchmark

ScoreItem = tuple[list[int], list[list[int]]]  # a prompt and its continuations


class Backend(Protocol):
    """A model that scores. ``context``: the maximum length of a prompt with its continuation, in tokens."""

    name: str
    context: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, including those that the model family puts before any text."""
        ...

    def score(
        self, items: Sequence[ScoreItem], progress: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        """The log-probability of every continuation, summed over its tokens."""
        ...


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A question as the model reads it."""

    question: Question
    prompt: str
    shots: int
    ids: list[int]
    continuations: list[list[int]]  # one for each of the question's letters


@dataclass(frozen=True)
class Answer:
    """``logprobs``: one natural log-probability for each letter of the question, in their order."""

    prompt: Prompt
    logprobs: Sequence[float]

    @property
    def question(self) -> Question:
        return self.prompt.question

    @property
    def prediction(self) -> str:
        """The likeliest letter; the first of equally likely ones."""
        return self.question.letters[self.logprobs.index(max(self.logprobs))]


def make_prompts(backend: Backend, benchmark: Benchmark, subject: Subject, shots: int) -> list[Prompt]:
    """The prompts of a subject's questions. Shots are dropped from the end until a prompt fits; the question
    is never truncated. Raises UserError for a question that does not fit without shots."""
    prompts = [benchmark.prompt(subject, question, shots) for question in subject.questions]
    items = _tokenised(backend, benchmark, subject.questions, prompts)
    made = []
    for question, prompt, (ids, continuations) in zip(subject.questions, prompts, items, strict=True):
        count = min(shots, len(subject.shots))
        while len(ids) + max(map(len, continuations)) > backend.context:
            if count == 0:
                raise UserError(
                    f"{benchmark.name}, {question.id}: its {len(ids)} tokens do not fit into the model's "
                    f"context of {backend.context}, even without examples"
                )
            count -= 1
            prompt = benchmark.prompt(subject, question, count)
            ((ids, continuations),) = _tokenised(backend, benchmark, [question], [prompt])
        made.append(
            Prompt(question=question, prompt=prompt, shots=count, ids=ids, continuations=continuations)
        )
    return made


def score_prompts(
    backend: Backend, prompts: Sequence[Prompt], progress: Callable[[int], None] | None = None
) -> list[Answer]:
    """Answers in the order of ``prompts``; short prompts are computed first, in batches of similar length."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    items = [(prompts[index].ids, prompts[index].continuations) for index in order]
    scores = dict(zip(order, backend.score(items, progress), strict=True))
    return [Answer(prompt, scores[index]) for index, prompt in enumerate(prompts)]


def _tokenised(
    backend: Backend, benchmark: Benchmark, questions: Sequence[Question], prompts: Sequence[str]
) -> list[ScoreItem]:
    """Prompt and answer are encoded together, because a blank or a colon may merge with the letter into one
    token; the answer begins where the ids differ."""
    texts = [
        prompt + benchmark.answer(question, letter)
        for question, prompt in zip(questions, prompts, strict=True)
        for letter in question.letters
    ]
    encoded = iter(backend.encode(texts))
    return [_divided([next(encoded) for _ in question.letters]) for question in questions]


def _divided(encoded: Sequence[list[int]]) -> ScoreItem:
    """The common prefix of the texts' ids, and the rest of each."""
    shortest = min(len(ids) for ids in encoded)
    first = encoded[0]
    common = shortest - 1  # leave at least one id of each
    while any(ids[:common] != first[:common] for ids in encoded):
        common -= 1
    assert common > 0, "answers without a common prefix"
    return first[:common], [ids[common:] for ids in encoded]
