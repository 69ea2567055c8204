"""Decontamination: finds documents that contain a benchmark's question, by its 13-grams.

As for GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix C), words are compared without case and
punctuation; Chinese, Japanese and Thai by characters. A document contains a question if it has at least
``overlap`` of the question's distinct 13-grams; one shared phrase, such as the title of a law, is not
contamination. A question shorter than 13 words must match as a whole. A question too short to be distinctive,
or shared by several items ("which of these is true?"), is searched for together with its options. One that is
still too short ("Simplify $\\sqrt{720}$.") must be a whole line or sentence.
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
from xverse.data.benchmarks import FILES, custom
from xverse.data.benchmarks.questions import LETTERS, RawQuestion
from xverse.data.prepare.ngrams import UNSPACED, hash_words, ngrams, split_words
from xverse.files import atomic_file

# A character in scripts without spaces, or a number in a text of numbers only, counts as half a word.
MIN_WORDS = 5.0  # of a text that may occur anywhere
MIN_LINE = 2.5  # of a text that must be a whole line or sentence
_UNSPACED = re.compile(f"[{UNSPACED}]")
_BREAKS = re.compile(r"[\r\n]+|(?<=[.!?:])[^\w\s]*\s+|(?<=[。！？：])")


@dataclass
class DecontaminateStage:
    """``data_dir``: the data directory of ``xverse eval``; ``benchmarks``: names, or descriptions of custom
    benchmarks (.yaml); by default all known ones in ``data_dir``."""

    data_dir: Path
    benchmarks: list[str] | None = None
    ngram: int = 13
    overlap: float = 0.5

    def __post_init__(self) -> None:
        if self.ngram < MIN_WORDS or not 0 < self.overlap <= 1:
            raise ValueError(
                f"decontaminate: ngram must be at least {MIN_WORDS:g}, overlap above 0 and at most 1"
            )

    def questions(self) -> Iterator[tuple[str, RawQuestion]]:
        """Every question, with its benchmark's name. Raises UserError for a benchmark that is missing."""
        names = self.benchmarks or [name for name, files in FILES.items() if files.present(self.data_dir)]
        if not names:
            raise UserError(f"{self.data_dir}: contains none of the benchmarks {', '.join(FILES)}")
        for name in names:
            for question in self._questions(name):
                if question.text.strip() or question.passage.strip():
                    yield Path(name).stem, question

    def _questions(self, name: str) -> Iterator[RawQuestion]:
        if custom.is_description(name):
            description = custom.load_description(Path(name))
            folder = description.in_folder(self.data_dir)
            present, questions = folder.is_dir(), custom.all_questions(description, self.data_dir)
        else:
            files, folder = choose("benchmark", name, FILES), self.data_dir / name
            present, questions = files.present(self.data_dir), files.all_questions(self.data_dir)
        if not present:
            raise UserError(f"{folder}: no such benchmark folder; `xverse eval fetch` gets the benchmarks")
        return questions


@dataclass
class Index:
    """The n-grams of all questions: for each length sorted ``grams``, uint64, and the texts they belong to,
    int32.

    ``texts``: (benchmark, question) of each text; ``totals`` int32 [texts]: its number of distinct n-grams;
    ``lines``: texts that must be a whole line or sentence; ``items``: number of questions of each benchmark;
    ``too_short``: questions that cannot be searched for.
    """

    overlap: float
    grams: dict[int, NDArray[np.uint64]]
    owners: dict[int, NDArray[np.int32]]
    totals: NDArray[np.int32]
    texts: list[tuple[str, str]]
    lines: list[int] = field(default_factory=list)
    items: dict[str, int] = field(default_factory=dict)
    too_short: dict[str, list[str]] = field(default_factory=dict)

    def find(self, text: str, hashes: NDArray[np.uint64] | None = None) -> set[tuple[str, str]]:
        """The (benchmark, question) in a document; ``hashes``: its hashed words, uint64 [words], if known."""
        hashes = hash_words(text) if hashes is None else hashes
        counts: Counter[int] = Counter()
        for n, table in self.grams.items():
            grams = ngrams(hashes, n)
            if len(grams) == 0:
                continue
            places = np.searchsorted(table, grams)
            places[places == len(table)] = 0
            hits = np.unique(grams[table[places] == grams])
            for start, stop in zip(
                np.searchsorted(table, hits, "left"), np.searchsorted(table, hits, "right"), strict=True
            ):
                counts.update(self.owners[n][start:stop].tolist())
        held = {i for i, count in counts.items() if count >= self.overlap * self.totals[i]}
        if short := held.intersection(self.lines):
            held -= short - self._as_lines(text)
        return {self.texts[i] for i in held}

    def _as_lines(self, text: str) -> set[int]:
        """The texts that are a whole line or sentence of a document."""
        matches: set[int] = set()
        for line in _BREAKS.split(text):
            hashes = hash_words(line)
            table = self.grams.get(len(hashes))
            if table is not None:
                whole = ngrams(hashes, len(hashes))[0]
                start, stop = np.searchsorted(table, whole, "left"), np.searchsorted(table, whole, "right")
                matches.update(self.owners[len(hashes)][start:stop].tolist())
        return matches

    def save(self, path: Path) -> None:
        """Write the index atomically, as .npz."""
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


def make_index(questions: Iterable[tuple[str, RawQuestion]], ngram: int = 13, overlap: float = 0.5) -> Index:
    """The index of questions, each with its benchmark's name."""
    pairs = list(questions)
    occurrences = Counter((name, " ".join(split_words(question.text))) for name, question in pairs)
    hashed: list[NDArray[np.uint64]] = []
    texts: list[tuple[str, str]] = []
    lines: list[int] = []
    too_short: dict[str, list[str]] = {}
    for name, question in pairs:
        searched = _searched(question, occurrences[name, " ".join(split_words(question.text))] == 1)
        if not searched:
            too_short.setdefault(name, []).append(question.id)
        for text in searched:
            if _length(text) < MIN_WORDS:
                lines.append(len(hashed))
            hashed.append(hash_words(text))
            texts.append((name, question.id))
    owned: dict[int, list[tuple[NDArray[np.uint64], int]]] = {}
    totals = np.zeros(len(hashed), np.int32)
    for i, hashes in enumerate(hashed):
        n = min(ngram, len(hashes))
        distinct = np.unique(ngrams(hashes, n))
        totals[i] = len(distinct)
        owned.setdefault(n, []).append((distinct, i))
    counts = dict(Counter(name for name, _ in pairs))
    index = Index(overlap, {}, {}, totals, texts, lines, counts, too_short)
    for n, parts in sorted(owned.items()):
        grams = np.concatenate([distinct for distinct, _ in parts])
        owners = np.concatenate([np.full(len(distinct), i, np.int32) for distinct, i in parts])
        order = np.argsort(grams, kind="stable")
        index.grams[n], index.owners[n] = grams[order], owners[order]
    return index


def _searched(question: RawQuestion, single: bool) -> list[str]:
    """The texts to search for; ``single``: no other question of its benchmark has the same text."""
    text, options = question.text, tuple(map(str, question.options))
    if single and _length(text) >= MIN_WORDS:
        forms, least = [text], MIN_WORDS
    else:
        lettered = [f"{letter} {option}" for letter, option in zip(LETTERS, options, strict=False)]
        forms = [" ".join((text, *options)), " ".join((text, *lettered))]
        least = MIN_WORDS if _length(forms[0]) >= MIN_WORDS else MIN_LINE
        if least == MIN_LINE and single:
            forms.append(text)  # the options may be on lines of their own
    searched = [form for form in dict.fromkeys(forms) if _length(form) >= least]
    if _length(question.passage) >= MIN_WORDS:
        searched.append(question.passage)
    return searched


def _length(text: str) -> float:
    """The number of words, with characters of scripts without spaces, and numbers in a text of numbers, as
    half."""
    words = split_words(text)
    if all(word.isnumeric() for word in words):
        return len(words) / 2
    return len(words) - sum(_UNSPACED.fullmatch(word) is not None for word in words) / 2
