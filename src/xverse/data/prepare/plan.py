"""What becomes of the documents: copies are dropped, some are held out, in bounded memory.

``Gather`` adds up the records of all groups, ``FindCopies`` compares keys, ``MakePlan`` decides. Of each
document these hold a few bytes in arrays, and no process reads the keys of all at once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xverse.config import UserError
from xverse.data.prepare.catalogue import Catalogue
from xverse.data.prepare.duplicates import (
    CHUNK,
    EXACT,
    NEAR,
    DuplicatesStage,
    Pairs,
    choose_copies,
    exact_pairs,
    jobs,
    near_pairs,
)
from xverse.data.prepare.keys import Keys
from xverse.data.prepare.ledger import GroupRecord, unreadable
from xverse.files import atomic_file, write_text
from xverse.log import notice
from xverse.texts import read_json

RANGES = 64  # of hashes, in which held-out documents are looked for one after the other
LISTED = 20  # unreadable files named one by one


@dataclass
class SplitSource:
    """One source of text: its remaining documents, and the hashes of the held-out ones."""

    name: str
    language: str
    category: str
    documents: int = 0
    text_bytes: int = 0
    valid: list[int] = field(default_factory=list)


@dataclass
class SplitPlan:
    """What becomes of the documents: sources by name with their held-out documents, and numbers of copies."""

    sources: dict[str, SplitSource]
    exact: int = 0
    near: int = 0

    @staticmethod
    def load(path: Path) -> SplitPlan:
        values = read_json(path)
        sources = {name: SplitSource(**source) for name, source in values.pop("sources").items()}
        return SplitPlan(sources, **values)


@dataclass
class Gathered:
    """All groups together: their numbers of documents, the sources (name, language, category), and for each
    group the numbers of its sources."""

    counts: NDArray[np.int64]
    sources: list[tuple[str, str, str]]
    places: list[list[int]]

    def save(self, work: Path) -> None:
        values = {**vars(self), "counts": self.counts.tolist()}
        write_text(work / "gathered.json", json.dumps(values, ensure_ascii=False))

    @staticmethod
    def load(work: Path) -> Gathered:
        values = read_json(work / "gathered.json")
        sources = [(name, language, category) for name, language, category in values["sources"]]
        return Gathered(np.array(values["counts"], np.int64), sources, values["places"])

    def keys(self, work: Path) -> Keys:
        return Keys(work / "clean", self.counts)


@dataclass
class Gather:
    """Adds up the records of the groups and checks them.

    Raises UserError if no document is left, or too much of the text is unreadable.
    """

    work: Path
    catalogue: Catalogue
    where: str
    max_bad_share: float
    allow_broken_files: bool

    def __call__(self, data: Any, rank: int, tasks: int) -> None:
        numbers: dict[str, int] = {}
        gathered = Gathered(np.zeros(len(self.catalogue), np.int64), [], [])
        problems: dict[str, str] = {}
        encodings: dict[str, list[str]] = {}
        broken: list[str] = []
        rules: set[str] = set()
        read = bad = 0
        for group in range(len(self.catalogue)):
            record = GroupRecord.load(self.work / "clean" / f"{group:05d}.json")
            gathered.counts[group] = record.documents
            for name, language, category in record.sources:
                if numbers.setdefault(name, len(numbers)) == len(gathered.sources):
                    gathered.sources.append((name, language, category))
            gathered.places.append([numbers[source[0]] for source in record.sources])
            rules |= set(record.ledger.dropped)
            for unit, done in zip(self.catalogue.units(group), record.units, strict=True):
                read, bad = read + done.report.read, bad + done.report.skipped
                if done.report.encoding:
                    encodings.setdefault(done.report.encoding, []).append(unit.name)
                if problem := unreadable(done.report):
                    problems[unit.name] = problem
                broken += [f"{unit.name}: {text}" for text in done.report.broken_files]
        for line in first_of(problems):
            notice(line)
        for encoding, names in encodings.items():
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            notice(f"read as {encoding}: {names[0]}{more}")
        why = "; ".join(f"{name}: {text}" for name, text in problems.items())
        self._check(read, bad, gathered, rules, broken, f" ({why[:500]})" if why else "")
        gathered.save(self.work)

    def _check(
        self, read: int, bad: int, gathered: Gathered, rules: set[str], broken: list[str], why: str
    ) -> None:
        if not read:
            raise UserError(f"{self.where}: no usable document in this corpus{why}")
        if not gathered.sources:
            raise UserError(f"{self.where}: the stages drop every document ({', '.join(sorted(rules))})")
        if bad > self.max_bad_share * (read + bad):
            raise UserError(
                f"{self.where}: {bad:,} of {read + bad:,} lines cannot be read, more than max_bad_share "
                f"{self.max_bad_share:g} allows{why}"
            )
        if broken and not self.allow_broken_files:
            raise UserError(
                f"{self.where}: {len(broken)} broken files, which allow_broken_files forbids: {broken[0]}"
            )


def first_of(problems: dict[str, str]) -> list[str]:
    """A line for each of the first files, and the number of further ones."""
    lines = [f"{name}: {text}" for name, text in problems.items()]
    more = len(lines) - LISTED
    return lines if more <= 0 else [*lines[:LISTED], f"and {more:,} more files, listed in report.md"]


@dataclass
class FindCopies:
    """Finds the pairs of copies of a rank's jobs: ``WORK/pairs/TASKS-RANK.npz``."""

    work: Path
    stage: DuplicatesStage | None

    def __call__(self, data: Any, rank: int, tasks: int) -> None:
        keys = Gathered.load(self.work).keys(self.work)
        exact, near = [np.empty((0, 2), np.int64)], [np.empty((0, 2), np.int64)]
        for band, part, parts in jobs(len(keys), self.stage is not None)[rank::tasks]:
            if band < 0:
                exact.append(exact_pairs(keys, part, parts))
            elif self.stage is not None:
                near.append(near_pairs(keys, band, part, parts, self.stage.least))
        path = self.work / "pairs" / f"{tasks}-{rank:05d}.npz"
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, exact=np.concatenate(exact), near=np.unique(np.concatenate(near), axis=0))


@dataclass
class PairFiles:
    """The pairs that ``FindCopies`` wrote, from one file at a time."""

    folder: Path

    def __iter__(self) -> Iterator[tuple[Pairs, Pairs]]:
        for path in sorted(self.folder.glob("*.npz")):
            with np.load(path) as arrays:
                yield arrays["exact"], arrays["near"]


@dataclass
class MakePlan:
    """Decides the fate of each document: ``WORK/fates.npy`` and ``WORK/plan.json``."""

    work: Path
    valid_share: float
    valid_bytes: int
    languages: list[str]

    def __call__(self, data: Any, rank: int, tasks: int) -> None:
        gathered = Gathered.load(self.work)
        keys = gathered.keys(self.work)
        fates = choose_copies(len(keys), PairFiles(self.work / "pairs"))
        with atomic_file(self.work / "fates.npy") as temporary, temporary.open("wb") as file:
            np.save(file, fates)
        documents, sizes = count_kept(gathered, keys, fates)
        sources = {
            name: SplitSource(name, language, category, int(documents[number]), int(sizes[number]))
            for number, (name, language, category) in enumerate(gathered.sources)
        }
        chosen = choose_valid(gathered, keys, fates, documents, sizes, self.valid_share, self.valid_bytes)
        for source, valid in zip(sources.values(), chosen, strict=True):
            source.valid = sorted(valid)
        copies = [int(np.count_nonzero(fates == kind)) for kind in (EXACT, NEAR)]
        plan = SplitPlan(
            {name: sources[name] for name in sorted(sources) if sources[name].documents}, *copies
        )
        for language in sorted(set(self.languages) - {source.language for source in plan.sources.values()}):
            notice(f"{language}: no document left in this language")
        write_text(self.work / "plan.json", json.dumps(dataclasses.asdict(plan)))


def count_kept(
    gathered: Gathered, keys: Keys, fates: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The documents that are kept of each source, and their bytes: int64 [sources] each."""
    documents, sizes = (np.zeros(len(gathered.sources), np.int64) for _ in range(2))
    for group, places in enumerate(gathered.places):
        rows, mine = keys.group(group), fates[keys.starts[group] : keys.starts[group + 1]]
        for start in range(0, len(rows), CHUNK):
            left = rows[start : start + CHUNK][mine[start : start + CHUNK] == 0]
            numbers = np.array(places, np.int64)[left["source"]]
            np.add.at(documents, numbers, 1)
            np.add.at(sizes, numbers, left["bytes"])
    return documents, sizes


class HeldOut:
    """Chooses the held-out documents of a source: the lowest hashes, up to a share of its bytes.

    Documents longer than ``most``, and all documents of a source with fewer than ten, stay in training.
    """

    def __init__(self, documents: int, text_bytes: int, share: float, most: int) -> None:
        self.most, self.budget = most, min(most, share * text_bytes)
        self.chosen: set[int] = set()
        self.used = 0
        self.done = documents < 10 or share == 0

    def offer(self, hashes: NDArray[np.uint64], sizes: NDArray[np.int64]) -> None:
        """Choose among the next documents, in ascending order of their hashes."""
        for key, size in zip(hashes.tolist(), sizes.tolist(), strict=True):
            if self.used >= self.budget:
                self.done = True
            if self.done:
                break
            if self.used + size <= self.most:
                self.chosen.add(key)
                self.used += size


def choose_valid(
    gathered: Gathered,
    keys: Keys,
    fates: NDArray[np.uint8],
    documents: NDArray[np.int64],
    sizes: NDArray[np.int64],
    share: float,
    most: int,
) -> list[set[int]]:
    """The hashes of the held-out documents of each source; looks at one range of hashes at a time."""
    held = [HeldOut(int(count), int(size), share, most) for count, size in zip(documents, sizes, strict=True)]
    for part in range(RANGES):
        if all(source.done for source in held):
            break
        hashes, lengths, numbers = [], [], []
        for group, places in enumerate(gathered.places):
            if all(held[number].done for number in places):
                continue
            rows = keys.group(group)
            mine = fates[keys.starts[group] : keys.starts[group + 1]]
            for values, at in keys.sorted("texts", group, 0, part, RANGES):
                kept = mine[at] == 0
                hashes.append(values[kept])
                lengths.append(rows["bytes"][at[kept]])
                numbers.append(np.array(places, np.int64)[rows["source"][at[kept]]])
        if not hashes:
            continue
        values, lengths_, owners = (np.concatenate(parts) for parts in (hashes, lengths, numbers))
        order = np.lexsort((values, owners))
        values, lengths_, owners = values[order], lengths_[order], owners[order]
        ends = np.searchsorted(owners, np.arange(len(held) + 1))
        for number, source in enumerate(held):
            if not source.done:
                begin, end = ends[number], ends[number + 1]
                source.offer(values[begin:end], lengths_[begin:end])
    return [source.chosen for source in held]
