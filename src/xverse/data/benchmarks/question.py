"""What every reader gives: subjects with their questions, and what was left out and why."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xverse.config import UserError

LETTERS = "ABCDEFG"


@dataclass(frozen=True)
class Question:
    """One question with a single right answer.

    ``options`` is empty where they stand in ``text``. ``answer`` is a letter, or None where it is not public.
    Questions of one ``item`` share a passage.
    """

    id: str
    text: str
    options: tuple[str, ...]
    answer: str | None
    letters: str = "ABCD"
    item: str = ""


@dataclass(frozen=True)
class Subject:
    """Questions that share their examples. ``shots`` are never among ``questions``."""

    name: str
    title: str  # as the prompt's first line names it
    category: str
    shots: tuple[Question, ...]
    questions: tuple[Question, ...]


@dataclass
class Reading:
    """How files are read, and what came of it: ``skip`` passes malformed rows over, and counts them."""

    skip: bool = False
    malformed: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # reason → questions
    notes: Counter[str] = field(
        default_factory=Counter
    )  # peculiarity → questions that are scored all the same

    def bad(self, path: Path, line: int, why: str) -> None:
        """Raises UserError that names file and line, or counts the row where rows may be skipped."""
        place = f"{path}: line {line}: {why}"
        if not self.skip:
            raise UserError(f"{place} (--skip-malformed passes such rows over)")
        self.malformed.append(place)

    def csv(self, path: Path) -> Iterator[tuple[int, list[str]]]:
        """The rows of a CSV file with the line on which each ends."""
        with _open(path) as file:
            reader = csv.reader(file, strict=True)
            while True:
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    self.bad(path, reader.line_num, str(error))
                    continue
                if row:
                    yield reader.line_num, row

    def jsonl(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """The objects of a JSON-lines file with their lines, counted from 1."""
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                except ValueError as error:
                    self.bad(path, number, f"not JSON ({error})")
                    continue
                if isinstance(values, dict):
                    yield number, values
                else:
                    self.bad(path, number, "not an object")


class _open:
    """A text file in UTF-8; what cannot be read is a UserError that names it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Iterator[str]:
        try:
            text = self.path.read_bytes().decode("utf-8-sig")
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such file; `xverse eval fetch` brings the sets") from None
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise UserError(f"{self.path}: line {line}: not UTF-8") from None
        return iter(text.splitlines(keepends=True) if "\x0b" not in text else text.split("\n"))

    def __exit__(self, *_: object) -> None:
        pass
