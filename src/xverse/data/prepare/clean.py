"""The first phase of ``xverse data prepare``: every file is read and processed by the stages.

For file ``i`` a task writes ``i.docs.jsonl.zst`` (text, lang, name and source of kept documents),
``i.keys.npy`` (hash, bytes and source of each), for near-duplicates ``i.bands.npy`` and ``i.signatures.npy``,
and last ``i.json``, the record that marks the file as done.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from xverse.config import UserError
from xverse.data.prepare.duplicates import BANDS, KEY, PERMUTATIONS, DuplicatesStage, band_hashes, signature
from xverse.data.prepare.ledger import Ledger, UnitRecord
from xverse.data.prepare.ngrams import hash_words
from xverse.data.prepare.readers import Document, Unit, read_unit
from xverse.data.prepare.stages.decontaminate import DecontaminateStage, Index, make_index
from xverse.data.prepare.stages.language import LanguageStage, identify
from xverse.data.prepare.stages.normalise import normalise
from xverse.data.prepare.stages.pii import scrub
from xverse.data.prepare.stages.quality import QualityStage, quality
from xverse.files import atomic_file
from xverse.texts import ReadReport, read_jsonl

BUFFER = 2_048  # documents whose keys are buffered


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
    """Reads the units of a rank and writes what the stages keep to ``folder``."""

    units: list[Unit]
    stages: StagesConfig
    folder: Path
    index: Path
    max_line_bytes: int
    seed: int
    _index: Index | None = field(default=None, init=False, repr=False)

    def __call__(self, data: Any, rank: int, tasks: int) -> None:
        # Largest files first, so that the last tasks are short.
        order = sorted(range(len(self.units)), key=lambda i: -self.units[i].size)
        index = Index.load(self.index) if self.stages.decontaminate is not None else None
        self.folder.mkdir(parents=True, exist_ok=True)
        for number in order[rank::tasks]:
            if not (self.folder / f"{number:05d}.json").exists():
                self._clean(number, index)

    def _clean(self, number: int, index: Index | None) -> None:
        unit, report, ledger = self.units[number], ReadReport(), Ledger()
        names: dict[tuple[str, str, str], int] = {}
        near = self.stages.near_duplicates is not None
        with UnitWriter(self.folder / f"{number:05d}", near) as writer:
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
                writer.add(document, name, source, key, place, numbers)
        record = UnitRecord(ledger, report, [list(name) for name in names])
        record.save(self.folder / f"{number:05d}.json")

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


class UnitWriter:
    """Writes the kept documents of one unit, through a small buffer; the files appear atomically."""

    def __init__(self, path: Path, near: bool) -> None:
        self.path, self.near = path, near
        self._stack = ExitStack()
        self._keys: list[tuple[int, int, int]] = []
        self._signatures: list[NDArray[np.uint32]] = []
        self._count = 0

    def __enter__(self) -> UnitWriter:
        import zstandard

        self._docs_path = self._stack.enter_context(atomic_file(f"{self.path}.docs.jsonl.zst"))
        self._raw: dict[str, tuple[Path, BinaryIO]] = {}
        for kind in ("keys", "bands", "signatures") if self.near else ("keys",):
            raw = self.path.with_name(f".{self.path.name}.{kind}.{platform.node()}.{os.getpid()}.tmp")
            self._raw[kind] = raw, self._stack.enter_context(raw.open("wb"))
        file = self._stack.enter_context(self._docs_path.open("wb"))
        docs = zstandard.ZstdCompressor(level=1).stream_writer(file, closefd=False)
        self._docs = cast(BinaryIO, io.BufferedWriter(cast(io.RawIOBase, docs), 1 << 20))
        return self

    def add(
        self, document: Document, name: str, source: str, key: int, place: int, numbers: NDArray[np.uint64]
    ) -> None:
        """Write a document; ``place``: index of its source; ``numbers``: its hashed words, uint64 [words]."""
        row = {"text": document.text, "lang": document.lang, "name": name, "source": source}
        self._docs.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._keys.append((key, len(document.text.encode()), place))
        if self.near:
            self._signatures.append(signature(numbers))
        if len(self._keys) >= BUFFER:
            self._flush()

    def _flush(self) -> None:
        self._raw["keys"][1].write(np.array(self._keys, KEY).tobytes())
        if self.near and self._signatures:
            minima = np.stack(self._signatures)  # [documents, PERMUTATIONS]
            self._raw["bands"][1].write(band_hashes(minima).astype("<u8").tobytes())
            self._raw["signatures"][1].write(minima.astype("<u2").tobytes())
        self._count += len(self._keys)
        self._keys, self._signatures = [], []

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        try:
            if kind is None:
                self._flush()
                self._docs.close()
                for name, (raw, file) in self._raw.items():
                    file.close()
                    self._write_array(name, raw)
        finally:
            for raw, _ in self._raw.values():
                raw.unlink(missing_ok=True)
            self._stack.__exit__(kind, *rest)

    def _write_array(self, name: str, raw: Path) -> None:
        shape: tuple[int, ...]
        kind, shape = {
            "keys": (KEY, (self._count,)),
            "bands": (np.dtype("<u8"), (self._count, BANDS)),
            "signatures": (np.dtype("<u2"), (self._count, PERMUTATIONS)),
        }[name]
        array: NDArray[Any] = np.memmap(raw, kind, "r", shape=shape) if self._count else np.empty(shape, kind)
        if name == "bands":
            array = array.T  # [BANDS, documents], because a search reads one band at a time
        with atomic_file(f"{self.path}.{name}.npy") as temporary, temporary.open("wb") as file:
            np.lib.format.write_array(file, np.ascontiguousarray(array))


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
    """The kept documents of a unit: text, lang, name, source."""
    for _, row in read_jsonl(path, limit=1 << 40):
        yield row
