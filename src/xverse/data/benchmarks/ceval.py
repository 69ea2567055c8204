"""C-Eval (Huang et al., arXiv:2305.08322)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from xverse.data.benchmarks.questions import (
    Options,
    Question,
    QuestionReader,
    RawQuestion,
    Subject,
    check_folder,
    json_file,
)

NAME, FOLDERS = "ceval", ("ceval",)
COLUMNS = ("id", "question", "A", "B", "C", "D")


def read(path: Path, name: str, reader: QuestionReader, *, answers: bool = False) -> Iterator[RawQuestion]:
    """Every question of a file; ``answers``: it must have a column of answers."""
    columns = (*COLUMNS, "answer") if answers else COLUMNS
    for where, row in reader.rows(path, columns):
        cells = dict(enumerate(row))
        yield RawQuestion(
            id=f"{name}/{cells.get(0, '')}",
            where=where,
            text=cells.get(1, ""),
            options=tuple(row[2:6]),
            answer=cells.get(6) if answers else None,
            problem="" if len(row) >= len(columns) else f"{len(row)} columns, expected {len(columns)}",
        )


def all_questions(data_dir: Path) -> Iterator[RawQuestion]:
    """Every question of every split, for decontamination."""
    for path in sorted((data_dir / "ceval").glob("*/*.csv")):
        yield from read(path, path.stem, QuestionReader(skip=True))


def subjects(folder: Path, reader: QuestionReader, options: Options) -> list[Subject]:
    """The subjects to score."""
    split = options.split or "val"
    check_folder(folder / split, NAME, "C-Eval")
    return [
        Subject(
            name=name,
            title=title,
            category=category,
            shots=tuple(_questions(folder, "dev", name, reader)[:5]),
            questions=tuple(_questions(folder, split, name, reader)),
        )
        for name, (_, title, category) in json_file(folder / "subject_mapping.json").items()
    ]


def _questions(folder: Path, split: str, name: str, reader: QuestionReader) -> list[Question]:
    path = folder / split / f"{name}_{split}.csv"
    return reader.questions(read(path, name, reader, answers=split != "test"))
