"""What a multiple-choice benchmark is: its questions, how a prompt is written, how its score is averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from xverse.data.benchmarks.questions import Question, Reader, Subject


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user may choose of how a benchmark is read."""

    split: str | None = None  # None: the benchmark's own
    fix_none: bool = False  # MMLU: the option "None" as it stands, where the official script reads "nan"


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
    load: Callable[[Path, Reader, Options], list[Subject]]
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


def first_ones_out(
    questions: Sequence[Question], count: int = 5
) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """The fixed rule for benchmarks whose authors published no shots: the first question of each of the first
    ``count`` items is a shot and is not scored. (An item's questions share the part of ``id`` before "#".)"""
    shots: dict[str, Question] = {}
    for question in questions:
        if len(shots) < count:
            shots.setdefault(question.id.partition("#")[0], question)
    chosen = {shot.id for shot in shots.values()}
    return tuple(shots.values()), tuple(each for each in questions if each.id not in chosen)


SHOTS_TAKEN_OUT = (
    "the first question of each of a subject's first five items; these are not scored (which ones XVERSE "
    "used is not published)"
)
