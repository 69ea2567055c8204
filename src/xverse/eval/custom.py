"""A benchmark of the user's own, described in a YAML file (docs/evaluation.md shows one)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from xverse.config import UserError, build, read_yaml
from xverse.data.benchmarks.questions import LETTERS, Question, Reader, Subject
from xverse.eval.benchmark import (
    SHOTS_TAKEN_OUT,
    Benchmark,
    Options,
    first_ones_out,
    lettered,
)


@dataclass(frozen=True, kw_only=True)
class Description:
    """``files``: of each split a pattern below ``folder``, whose ``*`` is the subject; ``shots``: the split
    that the examples come from, or None for the fixed rule. ``question``, ``options``, ``answer`` and
    ``passage`` name columns (CSV) or keys (JSON lines); ``options`` is one key that holds a list, or several
    columns."""

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


def load(path: Path) -> Benchmark:
    """Raises UserError for what is no description, naming the key."""
    values: Mapping[str, Any] = read_yaml(path)
    told = build(Description, values, str(path))
    if not re.fullmatch(r"[A-Za-z0-9_-]+", told.name):
        raise UserError(f"{path}: name: '{told.name}' has other characters than letters, digits, - and _")
    if told.split not in told.files:
        raise UserError(f"{path}: split '{told.split}' is none of files ({', '.join(told.files)})")
    if told.shots is not None and told.shots not in told.files:
        raise UserError(f"{path}: shots '{told.shots}' is none of files ({', '.join(told.files)})")
    for split, pattern in told.files.items():
        if not pattern.endswith((".csv", ".jsonl")):
            raise UserError(f"{path}: files, {split}: '{pattern}' is neither .csv nor .jsonl")
    passage = told.passage

    def item(question: Question) -> str:
        before = f"{question.passage.strip()}\n" if passage and question.passage.strip() else ""
        return f"{before}{question.text.strip()}{lettered(question)}\n{told.ask}"

    return Benchmark(
        name=told.name,
        title=told.title or told.name,
        folder=told.folder or told.name,
        split=told.split,
        splits=tuple(split for split in told.files if split != told.shots),
        load=lambda folder, reader, options: _subjects(told, folder, reader, options),
        header=lambda subject: told.header.replace("{subject}", subject.title),
        item=item,
        answer=lambda question, letter: told.letter.replace("{letter}", letter),
        between="\n\n",
        average=told.average,
        shots_rule=SHOTS_TAKEN_OUT if told.shots is None else f"the first five of split {told.shots}",
        method=f"described in {path.name}, tokens of {told.letter!r}",
    )


def _subjects(told: Description, folder: Path, reader: Reader, options: Options) -> list[Subject]:
    split = options.split or told.split
    pattern = told.files[split]
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise UserError(f"{folder / pattern}: no such file")
    subjects = []
    for path in paths:
        name = _subject_of(path, folder, pattern)
        found = _questions(told, path, name, reader)
        if told.shots is None:
            shots, scored = first_ones_out(found)
        else:
            examples = folder / told.files[told.shots].replace("*", name)
            shots, scored = tuple(_questions(told, examples, name, reader)[:5]), tuple(found)
        subjects.append(
            Subject(name=name, title=name.replace("_", " "), category="all", shots=shots, questions=scored)
        )
    return subjects


def _subject_of(path: Path, folder: Path, pattern: str) -> str:
    before, _, after = pattern.partition("*")
    return path.relative_to(folder).as_posix().removeprefix(before).removesuffix(after) or "all"


def _questions(told: Description, path: Path, name: str, reader: Reader) -> list[Question]:
    found = []
    for number, (where, row) in enumerate(_rows(path, reader)):
        options = row.get(told.options[0]) if len(told.options) == 1 else [row.get(o) for o in told.options]
        answer = row.get(told.answer)
        if isinstance(answer, int) and 0 <= answer < len(LETTERS):
            answer = LETTERS[answer]  # a place instead of a letter
        question = reader.question(
            where,
            row.get(told.question),
            options if isinstance(options, list) else [],
            answer,
            id=f"{name}/{number}",
            passage=str(row.get(told.passage) or "") if told.passage else "",
        )
        if question is not None:
            found.append(question)
    return found


def _rows(path: Path, reader: Reader) -> list[tuple[str, dict[str, Any]]]:
    if path.suffix == ".jsonl":
        return list(reader.objects(path))
    rows = list(reader.rows(path, None))
    columns = rows[0][1] if rows else []
    return [(where, dict(zip(columns, row, strict=False))) for where, row in rows[1:]]
