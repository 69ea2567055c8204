"""Token shards: uint32 tokens, int64 document offsets, a JSON header, a completion marker.

A shard is a directory::

    tokens.bin    uint32 little-endian [tokens]; each document ends with the end-of-text token
    offsets.bin   int64 little-endian [documents + 1]; document i is tokens[offsets[i]:offsets[i + 1]]
    header.json   format, tokenizer hash, language, category, counts
    DONE          SHA-256 of header.json, written last: without it the shard is unfinished
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from xverse.config import UserError
from xverse.files import fingerprint, write_text

FORMAT = 1
TOKEN = np.dtype("<u4")
OFFSET = np.dtype("<i8")
COPIED = 4_000_000  # entries copied at a time


@dataclass
class ShardHeader:
    """The metadata of a shard."""

    tokenizer: str
    language: str
    category: str = "text"
    recipe: str = ""
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    tokens_sha256: str = ""
    offsets_sha256: str = ""  # empty in shards of earlier versions
    format: int = FORMAT


def seal(path: Path, header: ShardHeader) -> None:
    """Finish a shard whose files and counts are complete: digests, header and marker.

    Raises UserError for a file of another size.
    """
    _check_sizes(path, header)
    for left in path.glob(".*.tmp"):  # of a killed writer
        left.unlink()
    header.tokens_sha256, header.offsets_sha256 = (
        fingerprint(path / name)[1] for name in ("tokens.bin", "offsets.bin")
    )
    text = json.dumps(dataclasses.asdict(header), indent=1, ensure_ascii=False) + "\n"
    write_text(path / "header.json", text)
    write_text(path / "DONE", hashlib.sha256(text.encode()).hexdigest() + "\n")


def _check_sizes(path: Path, header: ShardHeader) -> None:
    for name, count, kind in (
        ("tokens.bin", header.tokens, TOKEN),
        ("offsets.bin", header.documents + 1, OFFSET),
    ):
        expected = count * kind.itemsize
        size = (path / name).stat().st_size if (path / name).is_file() else -1
        if size != expected:
            state = "missing" if size < 0 else f"{size} bytes"
            raise UserError(
                f"{path / name}: {state}, expected {expected} bytes; delete {path} and prepare it again"
            )


class StoredArray:
    """The numbers in a file, read when they are indexed: by a number, a slice or an array of numbers.

    Not a memory map: a process that reads one whose file gets shorter is killed by SIGBUS. Raises UserError
    where the file ends too early or cannot be read.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], count: int) -> None:
        self.path, self.dtype, self._count = path, dtype, count
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, key: int) -> int: ...
    @overload
    def __getitem__(self, key: slice | NDArray[np.int64]) -> NDArray[Any]: ...
    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            start, stop, step = key.indices(self._count)
            assert step > 0
            return self._slice(start, stop, step)
        if isinstance(key, np.ndarray):
            return self._gather(key)
        number = int(key) + self._count * (key < 0)
        if not 0 <= number < self._count:
            raise IndexError(f"{self.path}: {key} of {self._count}")
        return int(self._read(number, number + 1)[0])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self._read(0, self._count).astype(dtype or self.dtype, copy=False)

    def _slice(self, start: int, stop: int, step: int) -> NDArray[Any]:
        if step == 1:
            return self._read(start, max(start, stop))
        size = max(1, COPIED // step) * step
        parts = [self._read(at, min(at + size, stop))[::step] for at in range(start, stop, size)]
        return np.concatenate([np.empty(0, self.dtype), *parts])

    def _gather(self, numbers: NDArray[np.int64]) -> NDArray[Any]:
        """By runs of neighbours, each of which is one read."""
        values = np.empty(len(numbers), self.dtype)
        starts = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
        for start, stop in itertools.pairwise([*starts.tolist(), len(numbers)]):
            first = int(numbers[start])
            values[start:stop] = self._read(first, first + stop - start)
        return values

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        size = self.dtype.itemsize
        values = np.empty(stop - start, self.dtype)
        view, done = values.view(np.uint8).data, 0
        try:
            while done < len(view):
                count = os.preadv(self._file, [view[done:]], start * size + done)
                if count == 0:
                    raise UserError(
                        f"{self.path}: ends at byte {start * size + done} of {self._count * size}; it was "
                        "cut short while the run reads it; prepare it again"
                    )
                done += count
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        return values


@dataclass(frozen=True, eq=False)
class Shard:
    """A finished shard, whose files are read when they are used."""

    path: Path
    header: ShardHeader
    tokens: StoredArray  # uint32 [tokens]
    offsets: StoredArray  # int64 [documents + 1]

    @property
    def name(self) -> str:
        return self.path.name

    def __len__(self) -> int:
        return self.header.documents

    def document(self, index: int) -> NDArray[np.uint32]:
        """The tokens of one document, uint32 [length], including the end token."""
        start, stop = self.offsets[index : index + 2]
        return self.tokens[int(start) : int(stop)]

    @staticmethod
    def open(path: str | Path) -> Shard:
        """Open a finished shard. Raises UserError naming a missing or damaged file."""
        path = Path(path)
        header = read_header(path)
        if header is None:
            raise UserError(f"{path}: not a finished token shard; run xverse data prepare again")
        _check_sizes(path, header)
        if header.documents == 0 or header.tokens == 0:
            raise UserError(f"{path}: this shard contains no documents")
        tokens = StoredArray(path / "tokens.bin", TOKEN, header.tokens)
        offsets = StoredArray(path / "offsets.bin", OFFSET, header.documents + 1)
        if offsets[0] != 0 or offsets[-1] != header.tokens or not _increasing(offsets):
            raise UserError(f"{path / 'offsets.bin'}: damaged; delete {path} and prepare it again")
        return Shard(path, header, tokens, offsets)


def _increasing(offsets: StoredArray) -> bool:
    """Whether each is larger than the one before, a part at a time: a large source has billions."""
    return all(
        bool(np.all(np.diff(offsets[start : start + COPIED + 1]) > 0))
        for start in range(0, len(offsets), COPIED)
    )


def read_header(path: Path) -> ShardHeader | None:
    """The header of a finished shard; None if there is none or it is unfinished.

    Raises UserError if the header is damaged or of another format.
    """
    marker, file = path / "DONE", path / "header.json"
    if not marker.is_file():
        return None
    try:
        text = file.read_text(encoding="utf-8")
        if hashlib.sha256(text.encode()).hexdigest() != marker.read_text().strip():
            raise ValueError("does not match its marker")
        values = json.loads(text)
        if values.get("format") != FORMAT:
            raise ValueError(f"format {values.get('format')}; this version reads {FORMAT}")
        return ShardHeader(**values)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged ({error}); delete {path} and prepare it again") from None
