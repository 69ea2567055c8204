"""Token shards: memory-mapped uint32 tokens, int64 document offsets, a JSON header, a completion marker.

A shard is a directory::

    tokens.bin    uint32 little-endian [tokens]; each document ends with the end-of-text token
    offsets.bin   int64 little-endian [documents + 1]; document i is tokens[offsets[i]:offsets[i + 1]]
    header.json   format, tokenizer hash, language, category, counts
    DONE          SHA-256 of header.json, written last: without it the shard is unfinished
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xverse.config import UserError
from xverse.files import atomic_file

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
    format: int = FORMAT


class ShardWriter:
    """Writes one shard, document by document; ``finish`` completes it.

    Replaces the leftovers of an interrupted writer in ``path``. Use it as a context manager: leaving the
    block without ``finish`` closes the files and leaves the shard unfinished.
    """

    def __init__(self, path: str | Path, header: ShardHeader) -> None:
        self.path = Path(path)
        self.header = header
        try:
            if self.path.exists():
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True)
            self._tokens = (self.path / "tokens.bin").open("wb")
            self._offsets = (self.path / "offsets.bin").open("wb")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from error
        self._offsets.write(np.zeros(1, OFFSET).tobytes())
        self._digest = hashlib.sha256()

    def add(self, tokens: NDArray[np.uint32], lengths: NDArray[np.int64], text_bytes: int) -> None:
        """Append documents of ``text_bytes`` bytes of text in all.

        ``tokens`` uint32 [tokens]: concatenated, each document with its end token; ``lengths`` int64
        [documents].
        """
        offsets = self.header.tokens + np.cumsum(lengths, dtype=OFFSET)
        self._write(tokens.astype(TOKEN, copy=False).tobytes(), offsets.astype(OFFSET))
        self.header.tokens += len(tokens)
        self.header.text_bytes += text_bytes

    def _write(self, tokens: bytes, offsets: NDArray[np.int64]) -> None:
        try:
            self._tokens.write(tokens)
            self._offsets.write(offsets.tobytes())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from error
        self._digest.update(tokens)
        self.header.documents += len(offsets)

    def finish(self) -> ShardHeader:
        """Close the files and write header and marker."""
        try:
            self._close()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from error
        self.header.tokens_sha256 = self._digest.hexdigest()
        _write_header(self.path, self.header)
        return self.header

    def _close(self) -> None:
        self._tokens.close()
        self._offsets.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


def seal(path: Path, header: ShardHeader) -> None:
    """Finish a shard whose files and counts are complete: digest, header and marker.

    Raises UserError for a file of another size.
    """
    _check_sizes(path, header)
    for left in path.glob(".*.tmp"):  # of a killed writer
        left.unlink()
    with (path / "tokens.bin").open("rb") as file:
        header.tokens_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    _write_header(path, header)


def _write_header(path: Path, header: ShardHeader) -> None:
    text = json.dumps(dataclasses.asdict(header), indent=1, ensure_ascii=False) + "\n"
    with atomic_file(path / "header.json") as temporary:
        temporary.write_text(text, encoding="utf-8")
    with atomic_file(path / "DONE") as temporary:
        temporary.write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")


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


class Shard:
    """A finished shard, memory-mapped.

    ``tokens`` uint32 [tokens], ``offsets`` int64 [documents + 1].
    """

    def __init__(
        self, path: Path, header: ShardHeader, tokens: NDArray[np.uint32], offsets: NDArray[np.int64]
    ) -> None:
        self.path, self.header, self.tokens, self.offsets = path, header, tokens, offsets

    @property
    def name(self) -> str:
        return self.path.name

    def __len__(self) -> int:
        return self.header.documents

    def document(self, index: int) -> NDArray[np.uint32]:
        """The tokens of one document, uint32 [length], including the end token."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @staticmethod
    def open(path: str | Path) -> Shard:
        """Map a finished shard. Raises UserError naming a missing or damaged file."""
        path = Path(path)
        header = read_header(path)
        if header is None:
            raise UserError(f"{path}: not a finished token shard; run xverse data prepare again")
        _check_sizes(path, header)
        if header.documents == 0 or header.tokens == 0:
            raise UserError(f"{path}: this shard contains no documents")
        tokens = np.memmap(path / "tokens.bin", TOKEN, "r")
        offsets = np.memmap(path / "offsets.bin", OFFSET, "r")
        ends = offsets[0] == 0 and offsets[-1] == header.tokens
        if not ends or not _ascending(path / "offsets.bin", len(offsets)):
            raise UserError(f"{path / 'offsets.bin'}: damaged; delete {path} and prepare it again")
        return Shard(path, header, tokens, offsets)


def _ascending(path: Path, count: int) -> bool:
    """Whether every document has a token; looks at a part of the offsets at a time."""
    return all(
        bool(np.all(part[1:] > part[:-1]))
        for start in range(0, count, COPIED)
        for part in (np.fromfile(path, OFFSET, COPIED + 1, offset=start * OFFSET.itemsize),)
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
