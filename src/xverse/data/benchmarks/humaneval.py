"""HumanEval (Chen et al., arXiv:2107.03374): the beginnings of Python functions, with tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xverse.config import UserError
from xverse.data.benchmarks.questions import QuestionReader, RawQuestion
from xverse.texts import stem

NAME, FOLDERS = "humaneval", ("humaneval",)


@dataclass(frozen=True)
class Problem:
    """``prompt``: signature and docstring; ``test`` defines check(function)."""

    task_id: str
    prompt: str
    test: str
    entry_point: str


def read(path: Path) -> Iterator[tuple[str, Problem]]:
    """The problems of a file with their places. Raises UserError for a missing or malformed file."""
    for where, row in QuestionReader().objects(path):
        values = [row.get(key) for key in ("task_id", "prompt", "test", "entry_point")]
        if not all(isinstance(value, str) for value in values):
            raise UserError(f"{where}: expected texts task_id, prompt, test and entry_point")
        yield where, Problem(*map(str, values))


def all_questions(data_dir: Path) -> Iterator[RawQuestion]:
    """Every prompt, for decontamination."""
    folder = data_dir / "humaneval"
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")]):
        for number, (where, problem) in enumerate(read(path)):
            yield RawQuestion(id=f"{stem(path)}/{number}", where=where, text=problem.prompt)
