"""Counts of a run's documents by stage, language and source, and examples of dropped ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xverse.files import write_text
from xverse.texts import ReadReport, read_json

EXAMPLES = 3
EXAMPLE_CHARACTERS = 240

Table = dict[str, list[int]]  # "language<tab>source" -> [documents, bytes]


@dataclass
class Ledger:
    """``read`` and ``kept`` by language and source; ``dropped`` the same by "stage: rule"; ``scrubbed`` by
    placeholder; ``examples`` of dropped documents, [hash, language, text]; ``questions`` found, by benchmark.
    """

    read: Table = field(default_factory=dict)
    kept: Table = field(default_factory=dict)
    dropped: dict[str, Table] = field(default_factory=dict)
    scrubbed: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[list[Any]]] = field(default_factory=dict)
    questions: dict[str, list[str]] = field(default_factory=dict)

    def count(self, table: Table, language: str, source: str, size: int) -> None:
        """Add a document of ``size`` bytes to a table."""
        add_table(table, {f"{language}\t{source}": [1, size]})

    def drop(self, why: str, language: str, source: str, text: str, key: int) -> None:
        """Count a dropped document; keep its beginning as an example if ``key`` is among the lowest."""
        self.count(self.dropped.setdefault(why, {}), language, source, len(text.encode()))
        self._keep(why, [[key, language, text[:EXAMPLE_CHARACTERS]]])

    def _keep(self, why: str, examples: list[list[Any]]) -> None:
        both = self.examples.setdefault(why, []) + examples
        self.examples[why] = sorted(both, key=lambda example: example[0])[:EXAMPLES]

    def add(self, other: Ledger) -> None:
        """Add the counts of another part of the run."""
        for mine, theirs in ((self.read, other.read), (self.kept, other.kept)):
            add_table(mine, theirs)
        for why, table in other.dropped.items():
            add_table(self.dropped.setdefault(why, {}), table)
        for mark, count in other.scrubbed.items():
            self.scrubbed[mark] = self.scrubbed.get(mark, 0) + count
        for why, examples in other.examples.items():
            self._keep(why, examples)
        for name, items in other.questions.items():
            self.questions[name] = sorted({*self.questions.get(name, ()), *items})


@dataclass
class UnitReport:
    """What was read from one file; ``owner``: the source to which its unreadable lines are counted."""

    report: ReadReport
    owner: str = ""


@dataclass
class GroupRecord:
    """The record of a group of files: its ledger, its files, its sources (name, language, category) and the
    number of documents kept."""

    ledger: Ledger
    units: list[UnitReport]
    sources: list[list[str]] = field(default_factory=list)
    documents: int = 0

    def save(self, path: Path) -> None:
        units = [
            [unit.owner, {name: value for name, value in vars(unit.report).items() if value}]
            for unit in self.units
        ]
        values = {**vars(self), "ledger": vars(self.ledger), "units": units}
        write_text(path, json.dumps(values, ensure_ascii=False))

    @staticmethod
    def load(path: Path) -> GroupRecord:
        values = read_json(path)
        units = [UnitReport(ReadReport(**report), owner) for owner, report in values["units"]]
        for unit in units:
            unit.report.bad_lines = [(line, why) for line, why in unit.report.bad_lines]
        return GroupRecord(Ledger(**values["ledger"]), units, values["sources"], values["documents"])


def unreadable(report: ReadReport) -> str:
    """What could not be read of a file, or that nothing is in it; otherwise empty."""
    return report.describe() or ("" if report.read else "no document in it")


def add_table(mine: Table, theirs: Table) -> None:
    """Add the rows of ``theirs`` to those of ``mine``."""
    for key, (documents, size) in theirs.items():
        row = mine.setdefault(key, [0, 0])
        row[0] += documents
        row[1] += size


def total(table: Iterable[list[int]]) -> tuple[int, int]:
    """(documents, bytes) of the rows of a table."""
    rows = list(table)
    return sum(row[0] for row in rows), sum(row[1] for row in rows)
