"""The texts that a tokenizer is trained on and measured with, read in bounded memory.

Of a ``.txt`` file each block of about 64 KB, up to a line end, is one text. Lines that cannot be used are
skipped and counted, as is one longer than 64 MB in JSON; in a ``.txt`` file such a line is cut into pieces of
1 MB.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from xverse.config import UserError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")
BLOCK = 1 << 16  # bytes of a .txt file that make one text
LONGEST_TEXT_LINE = 1 << 20
LONGEST_JSON_LINE = 1 << 26


@dataclass
class Skipped:
    """How many texts were read, and what was not."""

    read: int = 0
    bytes: int = 0
    bad_utf8: int = 0
    bad_json: int = 0
    no_text: int = 0
    too_long: int = 0
    broken_files: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """One line such as ``2 lines skipped: 1 invalid UTF-8, 1 ill-formed JSON``; empty if all was well."""
        kinds = {
            "invalid UTF-8": self.bad_utf8,
            "ill-formed JSON": self.bad_json,
            "without a text": self.no_text,
            "longer than 64 MB": self.too_long,
        }
        parts = [f"{count} {kind}" for kind, count in kinds.items() if count]
        lines = [f"{sum(kinds.values())} lines skipped: {', '.join(parts)}"] if parts else []
        return "; ".join(lines + self.broken_files)


@dataclass(frozen=True)
class Span:
    """A whole file (``end`` -1), or the lines of a .txt file that begin in its bytes begin … end - 1."""

    path: Path
    begin: int = 0
    end: int = -1


def find_files(names: Iterable[str | Path]) -> list[Path]:
    """Files as they are named, folders as the text files in them by name.

    Raises UserError for one that is missing, unreadable or of another kind, and for a folder without any.
    """
    found: list[Path] = []
    for path in map(Path, names):
        if path.is_dir():
            shown = sorted(file for file in path.iterdir() if not file.name.startswith("."))
            files = [file for file in shown if file.name.endswith(SUFFIXES)]
            if not files:
                raise UserError(f"{path}: is a directory without .txt, .jsonl or .jsonl.gz files")
        else:
            files = [path]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file}: no such file")
            if not os.access(file, os.R_OK):
                raise UserError(f"{file}: cannot be read (no permission)")
            if not file.name.endswith(SUFFIXES):
                raise UserError(f"{file}: expected a .txt, .jsonl or .jsonl.gz file")
        found += files
    return found


def file_language(path: Path) -> str:
    """The name without its suffix: ``en`` of en.jsonl.gz."""
    return path.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".txt")


def split_into_parts(files: Iterable[Path], size: int) -> list[list[Span]]:
    """Spans of about ``size`` bytes together, in the files' order: small ones joined, .txt files cut."""
    parts: list[list[Span]] = []
    room = 0
    for path in files:
        length = path.stat().st_size
        cut = size if path.name.endswith(".txt") else length
        for begin in range(0, length, max(cut, 1)):
            end = min(begin + cut, length)
            if room <= 0:
                parts.append([])
                room = size
            parts[-1].append(Span(path) if cut >= length else Span(path, begin, end))
            room -= end - begin
    return parts


def read_texts(span: Span, skipped: Skipped) -> Iterator[bytes]:
    """The texts of a span, in valid UTF-8, none empty.

    What a broken gzip stream gives before the break is used, and ``skipped.broken_files`` says so.
    Raises UserError where the file cannot be opened.
    """
    path = span.path
    try:
        opener = gzip.open if path.name.endswith(".gz") else open
        stream = cast(BinaryIO, opener(path, "rb"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    with stream:
        texts = _blocks(stream, span, skipped) if path.name.endswith(".txt") else _lines(stream, skipped)
        try:
            for text in texts:
                skipped.read += 1
                skipped.bytes += len(text)
                yield text
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            skipped.broken_files.append(f"broken gzip stream ({str(error).rstrip('.')})")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _blocks(stream: BinaryIO, span: Span, skipped: Skipped) -> Iterator[bytes]:
    at = span.begin
    if at:  # the line that is under way belongs to the span before
        stream.seek(at - 1)
        while (line := stream.readline(LONGEST_TEXT_LINE)) and not line.endswith(b"\n"):
            pass
        at = stream.tell()
    under_way = False  # a line that began in this span and was cut
    while span.end < 0 or at < span.end or under_way:
        block = stream.read(BLOCK if span.end < 0 else min(BLOCK, max(span.end - at, 0)))
        if not block.endswith(b"\n"):
            block += stream.readline(LONGEST_TEXT_LINE)
            if not block.endswith(b"\n"):
                block += _rest_of_character(stream)
        if not block:
            return
        at, under_way = at + len(block), not block.endswith(b"\n")
        if _is_utf8(block):
            yield block
            continue
        good = []
        for line in block.splitlines(keepends=True):
            if _is_utf8(line):
                good.append(line)
            else:
                skipped.bad_utf8 += 1
        if good:
            yield b"".join(good)


def _rest_of_character(stream: BinaryIO) -> bytes:
    """The bytes up to the next character: a cut in a long line is to be none in a character."""
    following = stream.read(3)
    count = next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))
    stream.seek(count - len(following), os.SEEK_CUR)
    return following[:count]


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _lines(stream: BinaryIO, skipped: Skipped) -> Iterator[bytes]:
    first = True
    while line := stream.readline(LONGEST_JSON_LINE):
        if first:
            line, first = line.removeprefix(b"\xef\xbb\xbf"), False
        if len(line) == LONGEST_JSON_LINE and not line.endswith(b"\n"):
            skipped.too_long += 1
            while (line := stream.readline(LONGEST_JSON_LINE)) and not line.endswith(b"\n"):
                pass
        elif line.strip() and (text := _parse(line, skipped)):
            yield text


def _parse(line: bytes, skipped: Skipped) -> bytes:
    try:
        item = json.loads(line.decode())
    except UnicodeDecodeError:
        skipped.bad_utf8 += 1
        return b""
    except (ValueError, RecursionError):
        skipped.bad_json += 1
        return b""
    text = item.get("text") if isinstance(item, dict) else None
    if not isinstance(text, str) or not text.strip():
        skipped.no_text += 1
        return b""
    try:
        return text.encode()
    except UnicodeEncodeError:  # JSON can escape half a surrogate pair, which no UTF-8 text holds
        skipped.bad_utf8 += 1
        return b""
