"""The files of a run, divided into groups, in ``WORK/units.jsonl`` and ``WORK/groups.npy``.

A group is a sequence of consecutive files that one task reads. Its size follows the bytes, not the number of
files, so that a million small files cost what one large file of the same text costs. Tasks read the lines of
their own groups only. Results do not depend on the division.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xverse.data.prepare.inputs import Input, Unit
from xverse.files import atomic_file

LEAST, MOST = 4 << 20, 64 << 20  # bytes of a group
GROUPS = 256  # wanted, where they are between LEAST and MOST
FILES = 4_096  # in a group at most
COMPRESSED = 4  # bytes of text in a byte of a compressed file, about


@dataclass
class Catalogue:
    """Reads what ``write`` wrote. ``inputs``: those of the recipe."""

    work: Path
    inputs: list[Input]

    @staticmethod
    def write(work: Path, inputs: list[Input], units: list[Unit], tasks: int | None) -> Catalogue:
        """Write the files, unless an earlier start of this run did; ``tasks``: groups wanted at least."""
        catalogue = Catalogue(work, inputs)
        if catalogue.path.exists():
            return catalogue
        numbers = {id(source): number for number, source in enumerate(inputs)}
        places = []
        with atomic_file(work / "units.jsonl") as temporary, temporary.open("wb") as file:
            for unit in units:
                places.append(file.tell())
                values = {field.name: getattr(unit, field.name) for field in dataclasses.fields(unit)}
                row = {**values, "input": numbers[id(unit.input)]}
                file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n")
        firsts = divide([weight(unit) for unit in units], tasks)
        table = np.array([firsts, [places[first] for first in firsts]], "<i8").T  # [groups, 2]
        with atomic_file(catalogue.path) as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate([table, [[len(units), -1]]]))
        return catalogue

    @property
    def path(self) -> Path:
        return self.work / "groups.npy"

    def table(self) -> NDArray[np.int64]:
        """First unit and its place in units.jsonl of each group, int64 [groups + 1, 2]."""
        table: NDArray[np.int64] = np.load(self.path)
        return table

    def __len__(self) -> int:
        """The number of groups."""
        return len(self.table()) - 1

    def units(self, group: int) -> Iterator[Unit]:
        """The files of a group."""
        (first, place), (last, _) = self.table()[group : group + 2].tolist()
        yield from self._read(place, last - first)

    def names(self) -> list[str]:
        """The names of all files."""
        return [unit.name for unit in self._read(0, int(self.table()[-1, 0]))]

    def _read(self, place: int, count: int) -> Iterator[Unit]:
        with (self.work / "units.jsonl").open("rb") as file:
            file.seek(place)
            for _ in range(count):
                row = json.loads(file.readline().decode("utf-8", "surrogateescape"))
                yield Unit(**{**row, "input": self.inputs[row["input"]]})


def weight(unit: Unit) -> int:
    """About the bytes of text in a file; those of a dataset's shard are unknown."""
    if not unit.size:
        return MOST if unit.path is None else 0
    return unit.size * (COMPRESSED if unit.name.endswith((".gz", ".zst", ".parquet")) else 1)


def divide(weights: list[int], tasks: int | None) -> list[int]:
    """The first file of each group; at least ``tasks`` groups if there are that many files."""
    total, least = sum(weights), LEAST if tasks is None else 0
    size = min(MOST, max(least, total // (tasks or GROUPS)))
    firsts: list[int] = []
    filled = 0
    for number, bytes_ in enumerate(weights):
        # A large file begins a group of its own. With tasks, there are as many groups as files allow.
        full = not firsts or filled >= size or number - firsts[-1] >= FILES
        needed = tasks is not None and len(weights) - number <= tasks - len(firsts)
        if full or needed or (filled and filled + bytes_ > MOST):
            firsts.append(number)
            filled = 0
        filled += bytes_
    return firsts
