"""Multiple-choice questions, and reading the files that hold them.

Every benchmark has one module here. Its ``read`` gives each question of a file as a ``RawQuestion``, whether
it can be scored or not: decontamination searches for all of them, scoring uses those that it can.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xverse.config import UserError
from xverse.records import read_csv
from xverse.texts import describe_type, parse_json, read_json, read_lines

LETTERS = "ABCDEFGHIJ"
SHOTS_TAKEN_OUT = (
    "the first question of each of a subject's first five items; these are not scored (which ones XVERSE "
    "used is not published)"
)


@dataclass(frozen=True, kw_only=True)
class RawQuestion:
    """A question as its file has it. ``where``: file and line; ``answer``: of any type, None if missing.

    ``letters``: the possible answers, where ``options`` do not tell; ``number``: of a blank in its passage;
    ``problem``: why the row is malformed, if it is.
    """

    id: str
    where: str
    text: str
    options: tuple[Any, ...] = ()
    passage: str = ""
    answer: Any = None
    letters: str = ""
    number: int = 0
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question that can be scored. ``answer``: the letter of the right option, None where it is not
    published. ``options`` is empty where they are part of the ``text``; ``letters`` then names them."""

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
    """The questions that are scored, and the ``shots`` that precede each of them, with their answers."""

    name: str
    title: str
    category: str
    shots: tuple[Question, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a benchmark is read, as far as the user can choose."""

    split: str | None = None  # None: the benchmark's default
    fix_none: bool = False  # MMLU: keep the option "None", which the official script reads as "nan"


@dataclass
class QuestionReader:
    """Reads rows. A malformed row is refused with its file and line, or skipped if ``skip``, and then listed
    in ``skipped``."""

    skip: bool = False
    skipped: list[str] = field(default_factory=list)

    def rows(self, path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[str, list[str]]]:
        """Rows of a CSV file with their places. ``columns``: names that the first row must begin with; None:
        the file has no row of names."""
        check_file(path)
        rows = read_csv(path)
        if columns is not None:
            _, header = next(rows, (0, []))
            if header[: len(columns)] != list(columns):
                raise UserError(f"{path}: the columns are {', '.join(header)}, expected {', '.join(columns)}")
        for number, row in rows:
            yield f"{path}, line {number}", row

    def objects(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Objects of a JSON-lines file with their places."""
        check_file(path)
        for number, line in read_lines(path):
            where = f"{path}, line {number}"
            try:
                value = parse_json(line, where)
            except UserError as error:
                self._refuse(str(error))
                continue
            if isinstance(value, dict):
                yield where, value
            else:
                self.refuse(where, "expected a JSON object")

    def refuse(self, where: str, why: str) -> None:
        """Raise UserError for a malformed row, or list it if malformed rows are skipped."""
        self._refuse(f"{where}: {why}")

    def _refuse(self, message: str) -> None:
        if not self.skip:
            raise UserError(f"{message} (--skip-malformed skips such rows)")
        self.skipped.append(message)

    def question(self, raw: RawQuestion) -> Question | None:
        """The question to score; None if it was skipped."""
        options = raw.options
        letters, answer = LETTERS[: len(options)], raw.answer
        if raw.problem:
            self.refuse(raw.where, raw.problem)
        elif not raw.text.strip():
            self.refuse(raw.where, "the question has no text")
        elif len(options) < 2:
            self.refuse(raw.where, "expected two or more options")
        elif not all(isinstance(option, str) for option in options):
            kind = next(describe_type(option) for option in options if not isinstance(option, str))
            self.refuse(raw.where, f"expected two or more options, all of them text; one is {kind}")
        elif answer is not None and (
            not isinstance(answer, str) or len(answer) != 1 or answer not in letters
        ):
            self.refuse(raw.where, f"the answer {answer!r} is not one of {', '.join(letters)}")
        else:
            return Question(id=raw.id, text=raw.text, options=options, answer=answer, passage=raw.passage)
        return None

    def questions(self, raws: Iterable[RawQuestion]) -> list[Question]:
        """Those that can be scored."""
        return [question for raw in raws if (question := self.question(raw)) is not None]


def first_ones_out(
    questions: Sequence[Question], count: int = 5
) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """Shots and scored questions where the authors published no shots.

    The first question of each of the first ``count`` items is a shot. (An item's questions share the part of
    ``id`` before "#".)
    """
    shots: dict[str, Question] = {}
    for question in questions:
        if len(shots) < count:
            shots.setdefault(question.id.partition("#")[0], question)
    chosen = {shot.id for shot in shots.values()}
    return tuple(shots.values()), tuple(question for question in questions if question.id not in chosen)


def text_of(value: Any) -> str:
    """The text of a row's value, empty for anything else."""
    return value if isinstance(value, str) else ""


def check_file(path: Path) -> None:
    """Raises UserError, naming the command that fetches benchmarks, if it does not exist."""
    if not path.exists():
        raise UserError(
            f"{path}: no such file; `xverse eval fetch` gets the benchmarks, --data-dir names the folder "
            "that holds them"
        )


def check_folder(path: Path, name: str, title: str) -> None:
    """The same for a folder of the benchmark ``name``."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; `xverse eval fetch {name}` gets {title}")


def json_file(path: Path) -> Any:
    """The value of a benchmark's JSON file. Raises UserError where it is missing or not valid."""
    check_file(path)
    return read_json(path)
