"""What a multiple-choice benchmark is: its questions, its prompts, and how its score is averaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xverse.data.benchmarks.questions import Options, Question, QuestionReader, Subject


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A prompt is the ``header``, then ``item``, ``answer`` and an empty line for each shot, and the
    question's ``item``. The first one of ``splits`` is scored by default.

    ``answer`` maps a letter to the text that follows an item: " A" and "A" are different tokens, and scores
    differ by points. ``average``: micro averages questions, macro subjects. ``load`` reads the subjects of a
    folder. The report prints ``shots_rule``, which questions are the shots, and ``method``, what else affects
    the scores.
    """

    name: str
    title: str
    folder: str
    splits: tuple[str, ...]
    load: Callable[[Path, QuestionReader, Options], list[Subject]]
    header: Callable[[Subject], str]
    item: Callable[[Question], str]
    answer: Callable[[Question, str], str]
    average: Literal["micro", "macro"]
    shots_rule: str
    method: str

    def shots(self, subject: Subject, count: int) -> str:
        """The common beginning of a subject's prompts: the header and the first ``count`` shots."""
        parts = [self.header(subject)]
        for shot in subject.shots[:count]:
            assert shot.answer is not None
            parts += [self.item(shot), self.answer(shot, shot.answer), "\n\n"]
        return "".join(parts)

    def prompt(self, subject: Subject, question: Question, count: int) -> str:
        """The prompt of a question; the model's answer is the letter whose ``answer`` is likeliest."""
        return self.shots(subject, count) + self.item(question)


def lettered(question: Question) -> str:
    """``\\nA. first\\nB. second`` …, as MMLU and C-Eval write options."""
    lines = zip(question.letters, question.options, strict=False)
    return "".join(f"\n{letter}. {option}" for letter, option in lines)
