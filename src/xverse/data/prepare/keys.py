"""Keys of documents, by which copies are found: stored sorted, so that a task reads only its own part.

A group of files (``catalogue.py``) has, besides ``GROUP.docs.jsonl.zst``:

    GROUP.keys         hash, bytes and source of each kept document, in their order
    GROUP.texts        the hashes again, sorted
    GROUP.bands        for near-duplicates: the hashes of its 32 bands, each sorted
    GROUP.signatures   the low halves of its minima, uint16 [documents, PERMUTATIONS]

Sorted files consist of a block for each 32,768 documents: the hashes uint64 [rows, documents] in ascending
order, then the places uint32 [rows, documents] of their documents in the group. So a group of any size is
written in bounded memory, and a range of hashes is a slice of every block.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from xverse.data.prepare.signatures import BANDS, PERMUTATIONS, band_hashes, signature

KEY = np.dtype([("text", "<u8"), ("bytes", "<i8"), ("source", "<i4")])
BLOCK = 32_768  # documents
HASH, PLACE = np.dtype("<u8"), np.dtype("<u4")


class KeyWriter:
    """Writes the keys of a group's documents; the files appear when the block ends without an exception."""

    def __init__(self, path: Path, near: bool) -> None:
        self.path, self.near, self.count = path, near, 0
        self._keys: list[tuple[int, int, int]] = []
        self._signatures: list[NDArray[np.uint32]] = []
        self._stack = ExitStack()
        self._files: dict[str, tuple[Path, BinaryIO]] = {}

    def __enter__(self) -> KeyWriter:
        for kind in ("keys", "texts", *(("bands", "signatures") if self.near else ())):
            name = f".{self.path.name}.{kind}.{platform.node()}.{os.getpid()}.tmp"
            temporary = self.path.with_name(name)
            self._files[kind] = temporary, self._stack.enter_context(temporary.open("wb"))
        return self

    def add(self, key: int, size: int, place: int, numbers: NDArray[np.uint64]) -> None:
        """Add a document of ``size`` bytes; ``place``: its source; ``numbers``: hashed words, uint64
        [words]."""
        self._keys.append((key, size, place))
        if self.near:
            self._signatures.append(signature(numbers))
        if len(self._keys) >= BLOCK:
            self._flush()

    def _flush(self) -> None:
        minima = np.stack(self._signatures) if self.near else None  # [documents, PERMUTATIONS]
        self.write(np.array(self._keys, KEY), minima)
        self._keys, self._signatures = [], []

    def write(self, keys: NDArray[Any], minima: NDArray[np.uint32] | None = None) -> None:
        """Write a block: KEY [documents], and uint32 [documents, PERMUTATIONS] for near-duplicates."""
        self._files["keys"][1].write(keys.tobytes())
        self._write_sorted("texts", keys["text"][None])
        if minima is not None:
            self._files["signatures"][1].write(minima.astype("<u2").tobytes())
            self._write_sorted("bands", band_hashes(minima).T)
        self.count += len(keys)

    def _write_sorted(self, kind: str, hashes: NDArray[np.uint64]) -> None:
        order = np.argsort(hashes, axis=1, kind="stable")  # [rows, documents]
        file = self._files[kind][1]
        file.write(np.take_along_axis(hashes, order, axis=1).astype(HASH).tobytes())
        file.write(order.astype(PLACE).tobytes())

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        try:
            if kind is None:
                if self._keys:
                    self._flush()
                for name, (temporary, file) in self._files.items():
                    file.flush()
                    os.fsync(file.fileno())
                    file.close()
                    temporary.replace(f"{self.path}.{name}")
        finally:
            for temporary, _ in self._files.values():
                temporary.unlink(missing_ok=True)
            self._stack.__exit__(kind, *rest)


class Keys:
    """The keys of all groups' documents, which are numbered through the groups in order.

    ``counts``: documents of each group. Only one file is open at a time.
    """

    def __init__(self, folder: Path, counts: NDArray[np.int64]) -> None:
        self.folder = folder
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def group(self, group: int) -> NDArray[Any]:
        """The keys of a group's documents, KEY [documents], mapped."""
        empty = self.starts[group] == self.starts[group + 1]
        path = self.folder / f"{group:05d}.keys"
        return np.empty(0, KEY) if empty else np.memmap(path, KEY, "r")

    def slice(
        self, kind: str, row: int, part: int, parts: int
    ) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """The hashes of a row of ``texts`` or ``bands`` that fall to a part, uint64, and their documents,
        int64; ascending, and equal ones by document."""
        hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for group in np.flatnonzero(np.diff(self.starts)).tolist():
            for values, places in self.sorted(kind, group, row, part, parts):
                hashes.append(values)
                owners.append(places + self.starts[group])
        values, documents = np.concatenate(hashes), np.concatenate(owners)
        order = np.argsort(values, kind="stable")
        return values[order], documents[order]

    def sorted(
        self, kind: str, group: int, row: int, part: int, parts: int
    ) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
        """The hashes of a group that fall to a part, by block, and their places in the group."""
        rows = BANDS if kind == "bands" else 1
        left = int(self.starts[group + 1] - self.starts[group])
        if not left:
            return
        data = np.memmap(self.folder / f"{group:05d}.{kind}", np.uint8, "r")
        first = at = 0
        while left:
            size = min(left, BLOCK)
            begin = at + row * size * HASH.itemsize
            values = data[begin : begin + size * HASH.itemsize].view(HASH)
            begin = at + rows * size * HASH.itemsize + row * size * PLACE.itemsize
            places = data[begin : begin + size * PLACE.itemsize].view(PLACE)
            low, high = (_boundary(values, number, parts) for number in (part, part + 1))
            yield np.array(values[low:high]), places[low:high].astype(np.int64) + first
            at += rows * size * (HASH.itemsize + PLACE.itemsize)
            first, left = first + size, left - size

    def signatures(self, numbers: NDArray[np.int64]) -> NDArray[np.uint16]:
        """The signatures of documents given in ascending order, uint16 [documents, PERMUTATIONS]."""
        result = np.empty((len(numbers), PERMUTATIONS), np.uint16)
        groups = np.searchsorted(self.starts, numbers, side="right") - 1
        for group in np.unique(groups).tolist():
            begin, end = np.searchsorted(groups, [group, group + 1])
            data = np.memmap(self.folder / f"{group:05d}.signatures", "<u2", "r")
            result[begin:end] = data.reshape(-1, PERMUTATIONS)[numbers[begin:end] - self.starts[group]]
        return result


def _boundary(values: NDArray[np.uint64], part: int, parts: int) -> int:
    """The first index of sorted hashes that belongs to a part or a later one."""
    return len(values) if part >= parts else int(np.searchsorted(values, np.uint64((part << 64) // parts)))
