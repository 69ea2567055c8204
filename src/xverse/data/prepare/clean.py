"""The first phase of ``xverse data prepare``: every file is read and processed by the stages.

For a group of files a task writes ``GROUP.docs.jsonl.zst`` (text, lang, name and source of kept documents),
the keys of these documents (``keys.py``), and last ``GROUP.json``, the record that marks the group as done.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from xverse.config import UserError
from xverse.data.prepare.catalogue import Catalogue
from xverse.data.prepare.duplicates import DuplicatesStage
from xverse.data.prepare.inputs import Unit
from xverse.data.prepare.keys import KeyWriter
from xverse.data.prepare.ledger import GroupRecord, Ledger, UnitReport
from xverse.data.prepare.ngrams import hash_words
from xverse.data.prepare.readers import Document, read_unit
from xverse.data.prepare.stages.decontaminate import DecontaminateStage, Index, make_index
from xverse.data.prepare.stages.language import LanguageStage, identify
from xverse.data.prepare.stages.normalise import normalise
from xverse.data.prepare.stages.pii import scrub
from xverse.data.prepare.stages.quality import QualityStage, quality
from xverse.files import atomic_file
from xverse.texts import ReadReport, read_jsonl


@dataclass
class StagesConfig:
    """The stages of a run, in their order; absent ones are skipped."""

    normalise: bool = False
    language: LanguageStage | None = None
    quality: QualityStage | None = None
    pii: bool = False
    near_duplicates: DuplicatesStage | None = None
    decontaminate: DecontaminateStage | None = None

    def any(self) -> bool:
        """Whether there is any stage."""
        return any(vars(self).values())


@dataclass
class BuildIndex:
    """The preceding phase: builds the index of benchmark questions."""

    stage: DecontaminateStage
    path: Path

    def __call__(self, data: Any, rank: int, tasks: int) -> None:
        make_index(self.stage.questions(), self.stage.ngram, self.stage.overlap).save(self.path)


@dataclass
class Clean:
    """Reads the groups of a rank and writes what the stages keep to ``folder``."""

    catalogue: Catalogue
    stages: StagesConfig
    folder: Path
    index: Path
    max_line_bytes: int
    seed: int

    def __call__(self, data: Any, rank: int, tasks: int) -> None:
        index = Index.load(self.index) if self.stages.decontaminate is not None else None
        self.folder.mkdir(parents=True, exist_ok=True)
        for group in range(rank, len(self.catalogue), tasks):
            if not (self.folder / f"{group:05d}.json").exists():
                self._clean(group, index)

    def _clean(self, group: int, index: Index | None) -> None:
        path, ledger = self.folder / f"{group:05d}", Ledger()
        names: dict[tuple[str, str, str], int] = {}
        units: list[UnitReport] = []
        near = self.stages.near_duplicates is not None
        with DocumentWriter(Path(f"{path}.docs.jsonl.zst")) as documents, KeyWriter(path, near) as keys:
            for unit in self.catalogue.units(group):
                report, owners = ReadReport(), set()
                for document in read_unit(unit, report, self.max_line_bytes):
                    # The report has a row for each source; "project:path/of/the/file" counts as the project.
                    source = document.source.split(":")[0] or "-"
                    size = len(document.text.encode())
                    ledger.count(ledger.read, document.lang, source, size)
                    category = category_of(unit, document.lang)
                    why, numbers = self._stages(document, category, index, ledger)
                    key = text_hash(document.text, self.seed)
                    if why is not None:
                        ledger.drop(why, document.lang, source, document.text, key)
                        continue
                    if not document.lang:
                        raise UserError(
                            f"{unit.name}: a text without a language; give the input a lang, or enable "
                            "stages.language"
                        )
                    name = document.lang if category == "text" else f"{category}_{document.lang}"
                    place = names.setdefault((name, document.lang, category), len(names))
                    owners.add(name)
                    documents.add(document, name, source)
                    keys.add(key, len(document.text.encode()), place, numbers)
                units.append(UnitReport(report, min(owners, default="")))
        record = GroupRecord(ledger, units, [list(name) for name in names], keys.count)
        record.save(Path(f"{path}.json"))

    def _stages(
        self, document: Document, category: str, index: Index | None, ledger: Ledger
    ) -> tuple[str | None, NDArray[np.uint64]]:
        """Apply the stages; returns why the document is dropped, or None, and its hashed words, uint64
        [words]."""
        stages, code, nothing = self.stages, category == "code", np.empty(0, np.uint64)
        if stages.normalise:
            document.text = normalise(document.text, code)
            if not document.text.strip():
                return "normalise: empty", nothing
        if stages.language is not None and not code:
            why = self._language(document, stages.language)
            if why is not None:
                return f"language: {why}", nothing
        if stages.quality is not None and not code:
            why = quality(document.text, document.lang, stages.quality.rules(document.lang))
            if why is not None:
                return f"quality: {why}", nothing
        if stages.pii:
            document.text, marks = scrub(document.text)
            for mark, count in marks.items():
                ledger.scrubbed[mark] = ledger.scrubbed.get(mark, 0) + count
        if index is None and stages.near_duplicates is None:
            return None, nothing
        numbers = hash_words(document.text)
        if index is not None and (questions := index.find(document.text, numbers)):
            for benchmark, item in sorted(questions):
                ledger.questions.setdefault(benchmark, [])
                if item not in ledger.questions[benchmark]:
                    ledger.questions[benchmark].append(item)
            return f"decontaminate: {min(questions)[0]}", numbers
        return None, numbers

    @staticmethod
    def _language(document: Document, stage: LanguageStage) -> str | None:
        language, confidence = identify(document.text)
        if not language or confidence < stage.min_confidence:
            return "unsure"
        if document.lang and document.lang != language and stage.mismatch == "drop":
            return f"declared {document.lang}, detected {language}"
        document.lang = language
        return None if language in stage.languages else f"{language} not in languages"


class DocumentWriter:
    """Writes documents as JSON lines, compressed; the file appears atomically."""

    def __init__(self, path: Path) -> None:
        self.path, self._stack = path, ExitStack()

    def __enter__(self) -> DocumentWriter:
        import zstandard

        temporary = self._stack.enter_context(atomic_file(self.path))
        file = self._stack.enter_context(temporary.open("wb"))
        docs = zstandard.ZstdCompressor(level=1).stream_writer(file, closefd=False)
        self._docs = cast(BinaryIO, io.BufferedWriter(cast(io.RawIOBase, docs), 1 << 20))
        return self

    def add(self, document: Document, name: str, source: str) -> None:
        """Write a document of the run's source ``name``; ``source``: its row of the report."""
        row = {"text": document.text, "lang": document.lang, "name": name, "source": source}
        self._docs.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        try:
            if kind is None:
                self._docs.close()
        finally:
            self._stack.__exit__(kind, *rest)


def category_of(unit: Unit, language: str) -> str:
    """The input's category, or the prefix of a file's name before its language (``code`` of ``code_py``)."""
    if unit.input.category is not None:
        return unit.input.category
    return unit.lang.removesuffix(f"_{language}") if unit.lang.endswith(f"_{language}") else "text"


def text_hash(text: str, seed: int) -> int:
    """A 64-bit hash that identifies a text and, with the seed, decides whether it is held out."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "big")


def read_cleaned(path: Path) -> Iterator[dict[str, str]]:
    """The kept documents of a group: text, lang, name, source."""
    for _, row in read_jsonl(path, limit=1 << 40, encoding="utf-8"):
        yield row
