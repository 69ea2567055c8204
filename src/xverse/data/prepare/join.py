"""The segments of all groups become one token shard for each source and split.

``PlaceSegments`` decides where each segment goes, ``Join`` copies them, several tasks into a large file, and
``Seal`` adds digest, header and marker. So the bytes of a shard do not depend on the tasks.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from xverse.config import UserError
from xverse.data.prepare.encode import load_part, load_tokenizer
from xverse.data.prepare.plan import SplitPlan
from xverse.data.shards import COPIED, OFFSET, TOKEN, ShardHeader, read_header, seal
from xverse.files import atomic_file, write_text
from xverse.texts import read_json

SLICE = 1 << 28  # tokens that a task copies at a time: 1 GB
# Columns of a shard's table: group, first token and document in the group's files, tokens, documents.
GROUP, TOKENS_AT, DOCUMENTS_AT, TOKENS, DOCUMENTS = range(5)


@dataclass
class Target:
    """A shard to be joined."""

    split: str
    name: str
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0

    def table(self, work: Path) -> Path:
        return work / "layout" / f"{self.split}.{self.name}.npy"


@dataclass
class PlaceSegments:
    """Writes the table of each shard's segments, and ``WORK/layout.json``, the list of shards."""

    work: Path
    groups: int

    def __call__(self, data: Any, rank: int, tasks: int) -> None:
        targets: dict[tuple[str, str], Target] = {}
        rows: dict[tuple[str, str], list[tuple[int, ...]]] = {}
        for group in range(self.groups):
            tokens_at = documents_at = 0
            for split, name, tokens, documents, size in load_part(self.work, group)[1]:
                target = targets.setdefault((split, name), Target(split, name))
                row = (group, tokens_at, documents_at, tokens, documents)
                rows.setdefault((split, name), []).append(row)
                target.tokens += tokens
                target.documents += documents
                target.text_bytes += size
                tokens_at, documents_at = tokens_at + tokens, documents_at + documents
        for place, target in targets.items():
            with atomic_file(target.table(self.work)) as temporary, temporary.open("wb") as file:
                np.save(file, np.array(rows[place], np.int64))
        write_text(self.work / "layout.json", json.dumps([vars(targets[place]) for place in sorted(targets)]))


@dataclass
class Shards:
    """The shards of a run, of which a rank makes some: what ``Join`` and ``Seal`` have in common."""

    work: Path
    out: Path
    tokenizer: Path
    fingerprint: str

    def targets(self) -> list[tuple[Target, Path, ShardHeader, bool]]:
        """All shards, and whether they are finished. Raises UserError for one of another recipe."""
        plan, tokenizer = SplitPlan.load(self.work / "plan.json"), load_tokenizer(self.tokenizer).hash
        targets = []
        for values in read_json(self.work / "layout.json"):
            target = Target(**values)
            source, path = plan.sources[target.name], self.out / target.split / target.name
            header = read_header(path)
            if header is not None and (header.tokenizer, header.recipe) != (tokenizer, self.fingerprint):
                raise UserError(
                    f"{path}: made by another recipe or tokenizer; delete it or choose another out"
                )
            made = ShardHeader(tokenizer, source.language, source.category, self.fingerprint)
            made.documents, made.tokens, made.text_bytes = target.documents, target.tokens, target.text_bytes
            targets.append((target, path, made, header is not None))
        return targets


@dataclass
class Join(Shards):
    """Copies the slices of a rank into ``OUT/SPLIT/NAME/tokens.bin`` and ``offsets.bin``."""

    def __call__(self, data: Any, rank: int, tasks: int) -> None:
        jobs = [
            (target, path, number)
            for target, path, _, finished in self.targets()
            for number in range(0 if finished else -(-target.tokens // SLICE))
        ]
        for target, path, number in jobs[rank::tasks]:
            table = np.load(target.table(self.work))
            tokens_at = np.cumsum(table[:, TOKENS]) - table[:, TOKENS]
            documents_at = np.cumsum(table[:, DOCUMENTS]) - table[:, DOCUMENTS]
            mine = tokens_at // SLICE == number
            path.mkdir(parents=True, exist_ok=True)
            with _shared(path / "tokens.bin") as tokens, _shared(path / "offsets.bin") as offsets:
                if number == 0:
                    offsets.write(np.zeros(1, OFFSET).tobytes())
                self._copy(table[mine], tokens_at[mine], documents_at[mine], tokens, offsets)

    def _copy(
        self,
        table: NDArray[np.int64],
        tokens_at: NDArray[np.int64],
        documents_at: NDArray[np.int64],
        tokens: BinaryIO,
        offsets: BinaryIO,
    ) -> None:
        """Copy consecutive segments, int64 [segments, 5], to their places."""
        for row, to, document in zip(table.tolist(), tokens_at.tolist(), documents_at.tolist(), strict=True):
            part = self.work / "parts" / f"{row[GROUP]:05d}"
            tokens.seek(to * TOKEN.itemsize)
            for start in range(0, row[TOKENS], COPIED):
                count = min(COPIED, row[TOKENS] - start)
                offset = (row[TOKENS_AT] + start) * TOKEN.itemsize
                tokens.write(np.fromfile(f"{part}.tokens", TOKEN, count, offset=offset).tobytes())
            at = row[DOCUMENTS_AT] * OFFSET.itemsize
            lengths = np.fromfile(f"{part}.lengths", OFFSET, row[DOCUMENTS], offset=at)
            offsets.seek((document + 1) * OFFSET.itemsize)
            offsets.write((to + np.cumsum(lengths)).astype(OFFSET).tobytes())


def _shared(path: Path) -> BinaryIO:
    """Open a file into which several tasks write, without truncating it."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")


@dataclass
class Seal(Shards):
    """Finishes the shards of a rank."""

    def __call__(self, data: Any, rank: int, tasks: int) -> None:
        for _, path, header, finished in self.targets()[rank::tasks]:
            if not finished:
                seal(path, header)
