"""Decontamination: documents that hold a benchmark's question are found by its 13-grams.

As for GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix C) words are compared without case and
punctuation; Chinese, Japanese and Thai by characters. A document holds a question where it has at least
``overlap`` of the question's distinct 13-grams: one shared phrase, such as a law's title, is no
contamination. A question shorter than 13 words counts whole. One that is too short to be told from ordinary
text, or that several items share ("which of these is true?"), is looked for together with its options. One
that is too short even so ("Simplify $\\sqrt{720}$.") counts where it is a whole line or sentence.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xverse.config import UserError, choose
from xverse.data.benchmarks.questions import LETTERS
from xverse.data.benchmarks.texts import READERS, Item
from xverse.data.prepare.ngrams import UNSPACED, ngrams, word_numbers, words
from xverse.files import atomic_file

# Characters where words have no spaces, and numbers where there is nothing else, are half a word each.
MIN_WORDS = 5.0  # of a text that is looked for anywhere
MIN_LINE = 2.5  # of one that has to be a whole line or sentence
_BREAKS = re.compile(r"[\r\n]+|(?<=[.!?:])[^\w\s]*\s+|(?<=[。！？：])")


@dataclass
class DecontaminateStage:
    """``data_dir``: the folder of benchmarks of ``xverse eval``; ``benchmarks``: by default all in it."""

    data_dir: Path
    benchmarks: list[str] | None = None
    ngram: int = 13
    overlap: float = 0.5

    def __post_init__(self) -> None:
        if self.ngram < MIN_WORDS or not 0 < self.overlap <= 1:
            raise ValueError(f"decontaminate: ngram is at least {MIN_WORDS:g}, overlap above 0 and at most 1")

    def names(self) -> list[str]:
        """The benchmarks that are looked for. Raises UserError where one is missing."""
        for name in self.benchmarks or ():
            choose("benchmark", name, READERS)
            if not (self.data_dir / name).is_dir():
                raise UserError(f"{self.data_dir / name}: no such benchmark folder; see xverse eval fetch")
        found = self.benchmarks or [name for name in READERS if (self.data_dir / name).is_dir()]
        if not found:
            raise UserError(f"{self.data_dir}: none of the benchmarks is here ({', '.join(READERS)})")
        return found


@dataclass
class Index:
    """The n-grams of all questions: for each length sorted ``grams`` uint64 and whose they are, int32.

    ``texts``: (benchmark, item) of each text; ``totals`` int32 [texts]: its distinct n-grams; ``lines``:
    those that have to be a whole line or sentence; ``items``: how many items of each benchmark there are;
    ``too_short``: those that cannot be looked for.
    """

    overlap: float
    grams: dict[int, NDArray[np.uint64]]
    owners: dict[int, NDArray[np.int32]]
    totals: NDArray[np.int32]
    texts: list[tuple[str, str]]
    lines: list[int] = field(default_factory=list)
    items: dict[str, int] = field(default_factory=dict)
    too_short: dict[str, list[str]] = field(default_factory=dict)

    def find(self, text: str, numbers: NDArray[np.uint64] | None = None) -> set[tuple[str, str]]:
        """The (benchmark, item) that a document holds; ``numbers``: its words, uint64 [words], if known."""
        numbers = word_numbers(text) if numbers is None else numbers
        counts: Counter[int] = Counter()
        for n, table in self.grams.items():
            found = ngrams(numbers, n)
            if len(found) == 0:
                continue
            places = np.searchsorted(table, found)
            places[places == len(table)] = 0
            hits = np.unique(found[table[places] == found])
            for start, stop in zip(
                np.searchsorted(table, hits, "left"), np.searchsorted(table, hits, "right"), strict=True
            ):
                counts.update(self.owners[n][start:stop].tolist())
        held = {i for i, count in counts.items() if count >= self.overlap * self.totals[i]}
        if short := held.intersection(self.lines):
            held -= short - self._as_lines(text)
        return {self.texts[i] for i in held}

    def _as_lines(self, text: str) -> set[int]:
        """The texts that are whole lines or sentences of a document."""
        found: set[int] = set()
        for line in _BREAKS.split(text):
            numbers = word_numbers(line)
            table = self.grams.get(len(numbers))
            if table is not None:
                whole = ngrams(numbers, len(numbers))[0]
                start, stop = np.searchsorted(table, whole, "left"), np.searchsorted(table, whole, "right")
                found.update(self.owners[len(numbers)][start:stop].tolist())
        return found

    def save(self, path: Path) -> None:
        arrays: dict[str, Any] = {f"grams{n}": table for n, table in self.grams.items()}
        arrays |= {f"owners{n}": table for n, table in self.owners.items()}
        rest = {key: value for key, value in asdict(self).items() if key not in ("grams", "owners", "totals")}
        about = np.frombuffer(json.dumps(rest).encode(), np.uint8)
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, totals=self.totals, about=about, **arrays)

    @staticmethod
    def load(path: Path) -> Index:
        with np.load(path) as arrays:
            about = json.loads(arrays["about"].tobytes())
            about["texts"] = [tuple(text) for text in about["texts"]]
            lengths = sorted(
                int(name.removeprefix("grams")) for name in arrays.files if name.startswith("grams")
            )
            tables: Any = [{n: arrays[f"{kind}{n}"] for n in lengths} for kind in ("grams", "owners")]
            return Index(grams=tables[0], owners=tables[1], totals=arrays["totals"], **about)


def read_items(stage: DecontaminateStage) -> Iterator[tuple[str, Item]]:
    """Every item of the stage's benchmarks, with the benchmark's name."""
    for name in stage.names():
        for item in READERS[name](stage.data_dir / name):
            yield name, item


def make_index(items: Iterable[tuple[str, Item]], ngram: int = 13, overlap: float = 0.5) -> Index:
    """The index of benchmark items."""
    read = list(items)
    seen = Counter((name, " ".join(words(item.text))) for name, item in read)
    chosen: list[NDArray[np.uint64]] = []
    texts: list[tuple[str, str]] = []
    lines: list[int] = []
    too_short: dict[str, list[str]] = {}
    for name, item in read:
        single = seen[name, " ".join(words(item.text))] == 1
        if single and _length(item.text) >= MIN_WORDS:
            forms, least = [item.text], MIN_WORDS
        else:
            lettered = [f"{letter} {option}" for letter, option in zip(LETTERS, item.options, strict=False)]
            forms = [" ".join((item.text, *item.options)), " ".join((item.text, *lettered))]
            least = MIN_WORDS if _length(forms[0]) >= MIN_WORDS else MIN_LINE
            if least == MIN_LINE and single:
                forms.append(item.text)  # the options may stand on lines of their own
        looked = [each for each in dict.fromkeys(forms) if _length(each) >= least]
        if _length(item.passage) >= MIN_WORDS:
            looked.append(item.passage)
        if not looked:
            too_short.setdefault(name, []).append(item.id)
        for each in looked:
            if _length(each) < MIN_WORDS:
                lines.append(len(chosen))
            chosen.append(word_numbers(each))
            texts.append((name, item.id))
    owned: dict[int, list[tuple[NDArray[np.uint64], int]]] = {}
    totals = np.zeros(len(chosen), np.int32)
    for i, numbers in enumerate(chosen):
        n = min(ngram, len(numbers))
        distinct = np.unique(ngrams(numbers, n))
        totals[i] = len(distinct)
        owned.setdefault(n, []).append((distinct, i))
    counts = dict(Counter(name for name, _ in read))
    index = Index(overlap, {}, {}, totals, texts, lines, counts, too_short)
    for n, parts in sorted(owned.items()):
        grams = np.concatenate([distinct for distinct, _ in parts])
        owners = np.concatenate([np.full(len(distinct), i, np.int32) for distinct, i in parts])
        order = np.argsort(grams, kind="stable")
        index.grams[n], index.owners[n] = grams[order], owners[order]
    return index


def _length(text: str) -> float:
    """Words; characters of scripts without spaces, and numbers where nothing else stands, for half a one."""
    found = words(text)
    if all(word.isnumeric() for word in found):
        return len(found) / 2
    return len(found) - sum(len(word) == 1 and _is_unspaced(word) for word in found) / 2


def _is_unspaced(character: str) -> bool:
    ranges = UNSPACED.split("-")
    starts = [part[-1] for part in ranges[:-1]]
    ends = [part[0] for part in ranges[1:]]
    return any(start <= character <= end for start, end in zip(starts, ends, strict=True))
