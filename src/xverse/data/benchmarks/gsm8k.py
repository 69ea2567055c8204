"""GSM8K (Cobbe et al., arXiv:2110.14168): grade-school mathematics in words, answered with a number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from xverse.data.benchmarks.questions import QuestionReader, RawQuestion, text_of
from xverse.texts import stem

NAME, FOLDERS = "gsm8k", ("gsm8k",)


def read(path: Path, name: str, reader: QuestionReader) -> Iterator[RawQuestion]:
    """Every problem of a file, with its worked solution as the answer."""
    for number, (where, row) in enumerate(reader.objects(path)):
        yield RawQuestion(
            id=f"{name}/{number}", where=where, text=text_of(row.get("question")), answer=row.get("answer")
        )


def all_questions(data_dir: Path) -> Iterator[RawQuestion]:
    """Every problem of every split, for decontamination."""
    folder = data_dir / "gsm8k"
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")]):
        yield from read(path, stem(path), QuestionReader(skip=True))
