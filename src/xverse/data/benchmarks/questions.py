"""Multiple-choice questions, and the files that hold them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from xverse.config import UserError

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True, kw_only=True)
class Question:
    """``answer``: the letter of the right option, or None where it is not published. ``options`` may be empty
    where they stand within the ``text``; ``letters`` then says which there are."""

    id: str
    text: str
    options: tuple[str, ...]
    answer: str | None
    passage: str = ""
    letters: str = ""

    def __post_init__(self) -> None:
        if not self.letters:
            object.__setattr__(self, "letters", LETTERS[: len(self.options)])
        assert self.answer is None or self.answer in self.letters, (self.id, self.answer, self.letters)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The questions that are scored, and the ``shots`` that come before each of them, with their answers."""

    name: str
    title: str
    category: str
    shots: tuple[Question, ...]
    questions: tuple[Question, ...]


@dataclass
class Reader:
    """Reads rows. One that is malformed is refused with its file and line, or left out where ``skip`` says
    so, and then stands in ``skipped``."""

    skip: bool = False
    skipped: list[str] = field(default_factory=list)

    def rows(self, path: Path, columns: Sequence[str] | None) -> Iterator[tuple[str, list[str]]]:
        """Rows of a CSV file with their places. ``columns``: names that its first row must have, in order;
        None: it has no such row."""
        with _opened(path) as file:
            lines = csv.reader(file, strict=True)
            try:
                if columns is not None:
                    found = next(lines, [])
                    if found[: len(columns)] != list(columns):
                        raise UserError(
                            f"{path}: the columns are {', '.join(found)}, expected {', '.join(columns)}"
                        )
                for row in lines:
                    yield f"{path}, line {lines.line_num}", row
            except (csv.Error, UnicodeDecodeError) as error:
                raise UserError(f"{path}, line {lines.line_num}: {error}") from None

    def objects(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Objects of a JSON-lines file with their places."""
        with _opened(path) as file:
            try:
                for number, line in enumerate(file, 1):
                    where = f"{path}, line {number}"
                    try:
                        value = json.loads(line)
                    except ValueError as error:
                        self.refuse(where, f"no JSON ({error})")
                        continue
                    if isinstance(value, dict):
                        yield where, value
                    else:
                        self.refuse(where, "no JSON object")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: {error}") from None

    def refuse(self, where: str, why: str) -> None:
        """A row that is malformed. Raises UserError unless such rows are to be left out."""
        if not self.skip:
            raise UserError(f"{where}: {why} (--skip-malformed leaves such rows out)")
        self.skipped.append(f"{where}: {why}")

    def question(
        self, where: str, text: Any, options: Sequence[Any], answer: Any, **more: Any
    ) -> Question | None:
        """A question whose parts are what they should be; None where it was left out."""
        letters = LETTERS[: len(options)]
        if not isinstance(text, str) or not text.strip():
            self.refuse(where, "the question has no text")
            return None
        if len(options) < 2 or not all(isinstance(option, str) for option in options):
            self.refuse(where, "fewer than two options, or one that is no text")
            return None
        if answer is not None and (not isinstance(answer, str) or len(answer) != 1 or answer not in letters):
            self.refuse(where, f"the answer {answer!r} is none of {', '.join(letters)}")
            return None
        return Question(text=text, options=tuple(options), answer=answer, **more)


def json_file(path: Path) -> Any:
    """Raises UserError for what is no JSON."""
    with _opened(path) as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise UserError(f"{path}: no JSON ({error})") from None


def _opened(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8", newline="")
    except OSError as error:
        _missing(path, error)


def _missing(path: Path, error: OSError) -> NoReturn:
    raise UserError(
        f"{path}: {error.strerror or error}; `xverse eval fetch` gets the benchmarks, --data-dir names "
        "the folder that holds them"
    ) from None
