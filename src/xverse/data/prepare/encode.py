"""Cleaned documents become tokens: each task encodes groups of files.

For a group it writes ``GROUP.tokens`` and ``GROUP.lengths`` (tokens of each document, int64), in segments
that belong to one split and source each, and last ``GROUP.json``: the ledger and the segments.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xverse.data.prepare.clean import read_cleaned
from xverse.data.prepare.duplicates import EXACT, NEAR
from xverse.data.prepare.ledger import Ledger
from xverse.data.prepare.plan import Gathered, SplitPlan
from xverse.data.shards import OFFSET, TOKEN
from xverse.files import atomic_file, write_text
from xverse.texts import read_json
from xverse.tokenizer import Tokenizer
from xverse.tokenizer.general import load_tokenizer_of

BATCH_BYTES = 1_000_000
SPLITS = ("train", "valid")
_COPY = {EXACT: "duplicates: exact", NEAR: "duplicates: near"}
Segment = tuple[str, str, int, int, int]  # split, source; tokens, documents, bytes of text


class Cleaned:
    """The cleaned documents of all groups, with their hashes and fates."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.keys = Gathered.load(work).keys(work)
        self.fates = np.load(work / "fates.npy", mmap_mode="r")

    def documents(self, group: int) -> Iterator[tuple[dict[str, str], int, int]]:
        """A group's documents, each with its hash and its fate (0: kept)."""
        first, last = self.keys.starts[group : group + 2].tolist()
        rows = read_cleaned(self.work / "clean" / f"{group:05d}.docs.jsonl.zst")
        keys = _values(self.keys.group(group)["text"])
        yield from zip(rows, keys, _values(self.fates[first:last]), strict=True)


def _values(array: NDArray[Any]) -> Iterator[int]:
    for start in range(0, len(array), 65_536):
        yield from array[start : start + 65_536].tolist()


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path, changed: int) -> Tokenizer:
    """Cached, because loading 100,534 entries takes a second or two; ``changed`` invalidates the cache."""
    return load_tokenizer_of(folder)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder, loaded once by a process."""
    return _tokenizer(folder, (folder / "tokenizer.json").stat().st_mtime_ns)


@dataclass
class Encode:
    """Encodes the groups of a rank into ``WORK/parts``."""

    work: Path
    tokenizer: Path
    groups: int

    def __call__(self, data: Any, rank: int, tasks: int) -> None:
        tokenizer = load_tokenizer(self.tokenizer)
        plan = SplitPlan.load(self.work / "plan.json")
        valid = {name: frozenset(source.valid) for name, source in plan.sources.items()}
        (self.work / "parts").mkdir(parents=True, exist_ok=True)
        cleaned = Cleaned(self.work)
        for group in range(rank, self.groups, tasks):
            if not (self.work / "parts" / f"{group:05d}.json").exists():
                self._encode(group, cleaned, valid, tokenizer)

    def _encode(
        self, group: int, cleaned: Cleaned, valid: dict[str, frozenset[int]], tokenizer: Tokenizer
    ) -> None:
        path, ledger = self.work / "parts" / f"{group:05d}", Ledger()
        pending: dict[tuple[str, str], list[str]] = {}
        sizes: dict[tuple[str, str], int] = {}
        segments: list[Segment] = []
        with (
            atomic_file(f"{path}.tokens") as tokens_path,
            atomic_file(f"{path}.lengths") as lengths_path,
            tokens_path.open("wb") as tokens_file,
            lengths_path.open("wb") as lengths_file,
        ):

            def flush(place: tuple[str, str]) -> None:
                tokens, lengths = tokenizer.encode_flat(pending.pop(place), tokenizer.eos_id)
                tokens_file.write(tokens.astype(TOKEN, copy=False).tobytes())
                lengths_file.write(lengths.astype(OFFSET).tobytes())
                segments.append((*place, len(tokens), len(lengths), sizes.pop(place)))

            for row, key, fate in cleaned.documents(group):
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
            for file in (tokens_file, lengths_file):
                file.flush()
                os.fsync(file.fileno())
        values = {"ledger": vars(ledger), "segments": segments}
        write_text(f"{path}.json", json.dumps(values, ensure_ascii=False))


def load_part(work: Path, group: int) -> tuple[Ledger, list[Segment]]:
    """What ``Encode`` recorded of a group."""
    values = read_json(work / "parts" / f"{group:05d}.json")
    return Ledger(**values["ledger"]), [tuple(segment) for segment in values["segments"]]
