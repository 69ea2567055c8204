"""What a multiple-choice benchmark is: its questions, how a prompt is written, how its score is averaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from xverse.data.benchmarks.questions import Options, Question, QuestionReader, Subject


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A prompt is the ``header``, every shot's ``item``, ``answer`` and ``between``, the question's ``item``.

    ``answer`` makes of a letter what follows an item: " A" and "A" are different tokens, and points apart.
    ``average``: micro counts questions, macro is the mean over subjects. ``load`` reads a folder's subjects.
    ``shots_rule`` says which questions are the shots, and ``method`` the rest that one has to know to compare
    scores; the report prints both.
    """

    name: str
    title: str
    folder: str
    split: str
    splits: tuple[str, ...]
    load: Callable[[Path, QuestionReader, Options], list[Subject]]
    header: Callable[[Subject], str]
    item: Callable[[Question], str]
    answer: Callable[[Question, str], str]
    between: str
    average: Literal["micro", "macro"]
    categories: tuple[str, ...] = ()
    shots_rule: str
    method: str
    source: str = ""
    notes: tuple[str, ...] = field(default=())

    def shots(self, subject: Subject, count: int) -> str:
        """What all questions of a subject begin with: the header and the first ``count`` shots."""
        parts = [self.header(subject)]
        for shot in subject.shots[:count]:
            assert shot.answer is not None
            parts += [self.item(shot), self.answer(shot, shot.answer), self.between]
        return "".join(parts)

    def prompt(self, subject: Subject, question: Question, count: int) -> str:
        """What the model reads; its answer is the likeliest of ``answer`` for each letter."""
        return self.shots(subject, count) + self.item(question)


def lettered(question: Question) -> str:
    """``\\nA. first\\nB. second`` …, as MMLU and C-Eval write options."""
    lines = zip(question.letters, question.options, strict=False)
    return "".join(f"\n{letter}. {option}" for letter, option in lines)
