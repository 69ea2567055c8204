"""How well vocabularies compress texts, by file (usually a language), as table, JSON and plot."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xverse.config import UserError, need
from xverse.log import notice
from xverse.texts import ReadReport, read_texts, stem
from xverse.tokenizer.vocabularies import ComparedVocabulary

BATCH = 256  # texts
LONGEST_WORDS = 20  # characters per word on average, above which a language does not separate words by spaces


@dataclass
class FileReport:
    """The figures of one vocabulary on one file. ``words`` are separated by white space."""

    file: str
    documents: int = 0
    bytes: int = 0
    characters: int = 0
    words: int = 0
    tokens: int = 0
    fallback_tokens: int = 0
    round_trip: bool = True

    @property
    def tokens_per_character(self) -> float:
        return self.tokens / max(1, self.characters)

    @property
    def rates(self) -> dict[str, float | None]:
        """``fertility``: tokens per word, None for languages without spaces between words. ``byte_fallback``:
        the share of tokens that encode only a part of a character."""
        tokens = max(1, self.tokens)
        apart = self.words * LONGEST_WORDS > self.characters
        return {
            "bytes_per_token": round(self.bytes / tokens, 4),
            "characters_per_token": round(self.characters / tokens, 4),
            "fertility": round(self.tokens / self.words, 4) if apart else None,
            "byte_fallback": round(self.fallback_tokens / tokens, 6),
        }


@dataclass
class VocabularyReport:
    """The figures of one vocabulary on all files."""

    vocabulary: ComparedVocabulary
    files: list[FileReport]
    used: int  # distinct ids that occurred

    @property
    def total(self) -> FileReport:
        names = ("documents", "bytes", "characters", "words", "tokens", "fallback_tokens")
        return FileReport("all", *(sum(getattr(row, name) for row in self.files) for name in names))

    @property
    def unused(self) -> int:
        return self.vocabulary.size - self.used

    def ratio(self, other: VocabularyReport) -> float:
        """The geometric mean over the files of this vocabulary's tokens per token of the other."""
        pairs = zip(self.files, other.files, strict=True)
        return math.exp(
            sum(math.log(max(1, one.tokens) / max(1, two.tokens)) for one, two in pairs) / len(self.files)
        )


def measure(vocabulary: ComparedVocabulary, files: Sequence[Path], notices: bool = True) -> VocabularyReport:
    """Encode all texts of the files, and decode them again if the vocabulary has a decoder.

    Raises UserError for a file without a usable text.
    """
    rows: list[FileReport] = []
    used: set[int] = set()
    for path in files:
        row = FileReport(str(path))
        skipped = ReadReport()
        texts = (text.decode() for text in read_texts(path, skipped))
        while batch := list(itertools.islice(texts, BATCH)):
            for text, ids in zip(batch, vocabulary.encode(batch), strict=True):
                row.documents += 1
                row.bytes += len(text.encode())
                row.characters += len(text)
                row.words += len(text.split())
                row.tokens += len(ids)
                used.update(ids)
                row.fallback_tokens += sum(index in vocabulary.pieces for index in ids)
                if vocabulary.decode is not None:
                    row.round_trip = row.round_trip and vocabulary.decode(ids) == text
        if notices and skipped.describe():
            notice(f"{path}: {skipped.describe()}")
        if not row.documents:
            raise UserError(f"{path}: no usable text in this file")
        rows.append(row)
    return VocabularyReport(vocabulary, rows, len(used))


def as_json(reports: Sequence[VocabularyReport]) -> list[dict[str, Any]]:
    """One mapping for each vocabulary; ``tokens_ratio``: tokens of the first per token of this one."""
    return [
        {
            "name": report.vocabulary.name,
            "vocab_size": report.vocabulary.size,
            "unused": report.unused,
            "tokens_ratio": round(reports[0].ratio(report), 4),
            "files": [{**vars(row), **row.rates} for row in report.files],
        }
        for report in reports
    ]


def overview(reports: Sequence[VocabularyReport]) -> list[list[str]]:
    """A table (head first): each vocabulary over all files; last, ``tokens_ratio``."""
    rows = [
        {
            "vocabulary": report.vocabulary.name,
            "entries": f"{report.vocabulary.size:,}",
            "unused": f"{report.unused:,}",
            **_shown(report.total.rates),
            "tokens of the first": f"{reports[0].ratio(report):.3f} ×",
        }
        for report in reports
    ]
    return [list(rows[0]), *(list(row.values()) for row in rows)]


def _shown(rates: Mapping[str, float | None], fertility: bool = False) -> dict[str, str]:
    """The columns of ``FileReport.rates``."""
    words = rates["fertility"]
    return {
        "bytes/token": f"{rates['bytes_per_token']:.2f}",
        "chars/token": f"{rates['characters_per_token']:.2f}",
        **({"tokens/word": "–" if words is None else f"{words:.2f}"} if fertility else {}),
        "byte fallback": f"{rates['byte_fallback']:.2%}",
    }


def by_file(reports: Sequence[VocabularyReport]) -> list[list[str]]:
    """A table (head first): tokens per character of every file under each vocabulary."""
    head = ["tokens per character", *(report.vocabulary.name for report in reports)]
    return [
        head,
        *(
            [stem(Path(rows[0].file)), *(f"{row.tokens_per_character:.3f}" for row in rows)]
            for rows in zip(*(report.files for report in reports), strict=True)
        ),
    ]


def in_detail(report: VocabularyReport) -> list[list[str]]:
    """A table (head first): every rate of every file under one vocabulary."""
    rows = [
        {
            "file": Path(row.file).name,
            "bytes": f"{row.bytes:,}",
            "tokens": f"{row.tokens:,}",
            **_shown(row.rates, fertility=True),
            "round trip": "ok" if row.round_trip else "LOST",
        }
        for row in report.files
    ]
    return [list(rows[0]), *(list(row.values()) for row in rows)]


def plot(reports: Sequence[VocabularyReport], target: Path) -> None:
    """Tokens per character of every file as PNG, sorted by the first vocabulary. Needs matplotlib."""
    matplotlib = need("matplotlib.figure", "eval", "report.png")
    first = reports[0]
    order = sorted(range(len(first.files)), key=lambda index: first.files[index].tokens_per_character)
    names = [stem(Path(first.files[index].file)) for index in order]
    figure = matplotlib.Figure(figsize=(8, 1.5 + 0.2 * len(order)), layout="constrained")
    axes = figure.subplots()
    for number, report in enumerate(reports):
        values = [report.files[index].tokens_per_character for index in order]
        style = {"marker": "o", "s": 18, "alpha": 0.8} if number else {"marker": "D", "s": 36, "zorder": 3}
        axes.scatter(values, range(len(order)), label=report.vocabulary.name, **style)
    axes.set_yticks(range(len(order)), names)
    axes.set_xlabel("tokens per character")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(target, format="png", dpi=120)
