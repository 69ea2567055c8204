"""A benchmark of the user's own, described in a YAML file (docs/evaluation.md shows one)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from xverse.config import UserError, build, read_yaml
from xverse.data.benchmarks.questions import (
    LETTERS,
    Options,
    Question,
    QuestionReader,
    RawQuestion,
    Subject,
    first_ones_out,
)
from xverse.texts import describe_type


@dataclass(frozen=True, kw_only=True)
class Description:
    """``files``: for each split a pattern below ``folder`` whose ``*`` is the subject; ``shots``: the split
    that the examples come from, or None to take them out of the scored questions. ``question``, ``options``,
    ``answer`` and ``passage`` name columns (CSV) or keys (JSON lines); ``options`` is one key that holds a
    list, or several columns."""

    name: str
    files: dict[str, str]
    split: str
    shots: str | None = None
    folder: str = ""
    question: str = "question"
    options: list[str] = field(default_factory=lambda: ["options"])
    answer: str = "answer"
    passage: str | None = None
    header: str = "The following are multiple choice questions (with answers) about {subject}.\n\n"
    ask: str = "Answer:"
    letter: str = " {letter}"
    average: Literal["micro", "macro"] = "micro"
    title: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ValueError(f"name: '{self.name}' has other characters than letters, digits, - and _")
        for key in ("split", "shots"):
            split = getattr(self, key)
            if split is not None and split not in self.files:
                raise ValueError(f"{key} '{split}' is not one of files ({', '.join(self.files)})")
        for split, pattern in self.files.items():
            if not pattern.endswith((".csv", ".jsonl")):
                raise ValueError(f"files, {split}: '{pattern}' is neither .csv nor .jsonl")

    def in_folder(self, data_dir: Path) -> Path:
        """Where the benchmark's files are."""
        return data_dir / (self.folder or self.name)


def is_description(name: str) -> bool:
    """Whether a benchmark's name is the path of a description."""
    return name.endswith((".yaml", ".yml"))


def load_description(path: Path) -> Description:
    """Raises UserError, naming the key, for an invalid description."""
    return build(Description, read_yaml(path), str(path))


def read(description: Description, path: Path, name: str, reader: QuestionReader) -> Iterator[RawQuestion]:
    """Every question of a file; their ids begin with ``name``."""
    for number, (where, row) in enumerate(_rows(path, reader)):
        keys, answer = description.options, row.get(description.answer)
        options = row.get(keys[0]) if len(keys) == 1 else [row.get(key) for key in keys]
        if type(answer) is int or (isinstance(answer, str) and answer.isascii() and answer.isdigit()):
            place = int(answer) if len(str(answer)) < 3 else -1  # a place instead of a letter
            answer = LETTERS[place] if 0 <= place < len(LETTERS) else answer
        text = row.get(description.question)
        passage = row.get(description.passage) if description.passage else None
        wrong = [
            f"{key} is {describe_type(value)}, not text"
            for key, value in ((description.question, text), (description.passage, passage))
            if value is not None and not isinstance(value, str)
        ]
        yield RawQuestion(
            id=f"{name}/{number}",
            where=where,
            text=text if isinstance(text, str) else "",
            options=tuple(options) if isinstance(options, list) else (),
            passage=passage if isinstance(passage, str) else "",
            answer=answer,
            problem="; ".join(wrong),
        )


def _rows(path: Path, reader: QuestionReader) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".jsonl":
        yield from reader.objects(path)
        return
    rows = reader.rows(path)
    _, columns = next(rows, ("", []))
    for where, row in rows:
        if len(row) == len(columns):
            yield where, dict(zip(columns, row, strict=True))
        elif row:
            reader.refuse(where, f"{len(row)} fields, expected {len(columns)}")


def all_questions(description: Description, data_dir: Path) -> Iterator[RawQuestion]:
    """Every question of every split, for decontamination."""
    folder = description.in_folder(data_dir)
    for pattern in description.files.values():
        for path in sorted(folder.glob(pattern)):
            name = path.relative_to(folder).with_suffix("").as_posix()
            yield from read(description, path, name, QuestionReader(skip=True))


def subjects(
    description: Description, folder: Path, reader: QuestionReader, options: Options
) -> list[Subject]:
    """The subjects to score."""
    pattern = description.files[options.split or description.split]
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise UserError(f"{folder / pattern}: no such file")
    before, _, after = pattern.partition("*")
    result = []
    for path in paths:
        name = path.relative_to(folder).as_posix().removeprefix(before).removesuffix(after) or "all"
        scored: tuple[Question, ...] = tuple(reader.questions(read(description, path, name, reader)))
        if description.shots is None:
            shots, scored = first_ones_out(scored)
        else:
            examples = folder / description.files[description.shots].replace("*", name)
            shots = tuple(reader.questions(read(description, examples, name, reader))[:5])
        title = name.replace("_", " ")
        result.append(Subject(name=name, title=title, category="all", shots=shots, questions=scored))
    return result
