"""The last phases of ``xverse data prepare``: cleaned documents become token shards.

Each task encodes whole files into parts, one for every source and split in the file; then the parts of a
source are joined in the order of the files. So the bytes of a shard do not depend on the number of tasks.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xverse.config import UserError
from xverse.data.prepare.clean import read_cleaned
from xverse.data.prepare.duplicates import EXACT, NEAR
from xverse.data.prepare.ledger import Ledger, UnitRecord
from xverse.data.shards import Shard, ShardHeader, ShardWriter, read_header
from xverse.files import atomic_file
from xverse.texts import read_json
from xverse.tokenizer import Tokenizer
from xverse.tokenizer.general import load_tokenizer_of

BATCH_BYTES = 1_000_000
SPLITS = ("train", "valid")
_COPY = {EXACT: "duplicates: exact", NEAR: "duplicates: near"}


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


def documents(work: Path, unit: int) -> Iterator[tuple[dict[str, str], int, int]]:
    """A unit's documents, each with its hash and its fate (0: kept)."""
    keys = np.load(work / "docs" / f"{unit:05d}.keys.npy")["text"].tolist()
    fates = np.load(work / "fates" / f"{unit:05d}.npy").tolist()
    yield from zip(read_cleaned(work / "docs" / f"{unit:05d}.docs.jsonl.zst"), keys, fates, strict=True)


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path, changed: int) -> Tokenizer:
    """Cached, because loading 100,534 entries takes a second or two; ``changed`` invalidates the cache."""
    return load_tokenizer_of(folder)


@dataclass
class Encode:
    """Encodes the units of a rank into ``WORK/parts/UNIT/SPLIT/NAME``."""

    work: Path
    tokenizer: Path
    sizes: list[int]
    fingerprint: str

    def __call__(self, data: Any, rank: int, tasks: int) -> None:
        tokenizer = _tokenizer(self.tokenizer, (self.tokenizer / "tokenizer.json").stat().st_mtime_ns)
        plan = SplitPlan.load(self.work / "plan.json")
        valid = {name: frozenset(source.valid) for name, source in plan.sources.items()}
        order = sorted(range(len(self.sizes)), key=lambda i: -self.sizes[i])
        for unit in order[rank::tasks]:
            if not (self.work / "parts" / f"{unit:05d}.json").exists():
                self._encode(unit, plan, valid, tokenizer)

    def _encode(
        self, unit: int, plan: SplitPlan, valid: dict[str, frozenset[int]], tokenizer: Tokenizer
    ) -> None:
        folder, ledger = self.work / "parts" / f"{unit:05d}", Ledger()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        pending: dict[tuple[str, str], list[str]] = {}
        sizes: dict[tuple[str, str], int] = {}
        with ExitStack() as stack:
            writers: dict[tuple[str, str], ShardWriter] = {}

            def flush(place: tuple[str, str]) -> None:
                split, name = place
                if place not in writers:
                    source = plan.sources[name]
                    header = ShardHeader(tokenizer.hash, source.language, source.category, self.fingerprint)
                    writers[place] = stack.enter_context(ShardWriter(folder / split / name, header))
                writers[place].add(
                    *tokenizer.encode_flat(pending.pop(place), tokenizer.eos_id), sizes.pop(place)
                )

            for row, key, fate in documents(self.work, unit):
                name, text = row["name"], row["text"]
                size = len(text.encode())
                if fate:
                    ledger.drop(_COPY[fate], row["lang"], row["source"], text, key)
                    continue
                ledger.count(ledger.kept, row["lang"], row["source"], size)
                place = ("valid" if key in valid[name] else "train", name)
                pending.setdefault(place, []).append(text)
                sizes[place] = sizes.get(place, 0) + size
                if sizes[place] >= BATCH_BYTES:
                    flush(place)
            for place in sorted(pending):
                flush(place)
            for writer in writers.values():
                writer.finish()
        with atomic_file(f"{folder}.json") as temporary:
            temporary.write_text(json.dumps(vars(ledger), ensure_ascii=False), encoding="utf-8")


@dataclass
class Join:
    """Joins the parts of a rank's sources into ``OUT/SPLIT/NAME``."""

    work: Path
    out: Path
    tokenizer: Path
    units: int
    fingerprint: str

    def __call__(self, data: Any, rank: int, tasks: int) -> None:
        plan = SplitPlan.load(self.work / "plan.json")
        tokenizer = _tokenizer(self.tokenizer, (self.tokenizer / "tokenizer.json").stat().st_mtime_ns).hash
        for name in sorted(plan.sources)[rank::tasks]:
            source = plan.sources[name]
            for split in SPLITS:
                path = self.out / split / name
                header = read_header(path)
                if header is not None and (header.tokenizer, header.recipe) != (tokenizer, self.fingerprint):
                    raise UserError(
                        f"{path}: made by another recipe or tokenizer; delete it or choose another out"
                    )
                if header is None:
                    self._join(
                        path,
                        split,
                        ShardHeader(tokenizer, source.language, source.category, self.fingerprint),
                    )

    def _join(self, path: Path, split: str, header: ShardHeader) -> None:
        folders = (self.work / "parts" / f"{unit:05d}" / split / path.name for unit in range(self.units))
        parts = [folder for folder in folders if folder.is_dir()]
        if not parts:
            return
        with ShardWriter(path, header) as writer:
            for part in parts:
                writer.append(Shard.open(part))
            writer.finish()


def unit_record(work: Path, unit: int) -> UnitRecord:
    """A unit's record including the last phases."""
    record = UnitRecord.load(work / "docs" / f"{unit:05d}.json")
    after = Ledger(**read_json(work / "parts" / f"{unit:05d}.json"))
    record.ledger.add(after)
    return record
