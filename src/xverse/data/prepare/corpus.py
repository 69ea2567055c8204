"""Reading text corpora: a folder of JSON-lines files, ``{"text", "lang", "source"}`` on each line.

Other kinds of files are read in ``xverse.data.prepare.readers``.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from xverse.config import UserError, need

SUFFIXES = (".jsonl", ".jsonl.gz")
MAX_LINE_BYTES = 64_000_000
LISTED = 1_000  # bad lines that are listed, of each file; the rest is counted
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass
class Document:
    """One text and the language it is in."""

    text: str
    lang: str
    source: str = ""


@dataclass
class CorpusReport:
    """What was read and what was skipped, in lines. ``bad_lines``: the first of them, (line from 1, why);
    ``broken_files``: how a file breaks off.
    """

    read: int = 0
    bad_utf8: int = 0
    bad_json: int = 0
    no_text: int = 0
    bad_lang: int = 0
    empty: int = 0
    too_long: int = 0
    broken_files: list[str] = field(default_factory=list)
    bad_lines: list[tuple[int, str]] = field(default_factory=list)

    @property
    def skipped(self) -> int:
        counts = (self.bad_utf8, self.bad_json, self.no_text, self.bad_lang, self.empty, self.too_long)
        return sum(counts)

    def skip(self, kind: str, line: int) -> None:
        """Count a line that is skipped; ``kind`` is one of the fields."""
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.bad_lines) < LISTED:
            self.bad_lines.append((line, KINDS[kind]))

    def describe(self) -> str:
        """One line such as ``2 lines skipped: 1 invalid UTF-8, 1 ill-formed JSON``; empty if all was well."""
        parts = [f"{getattr(self, kind)} {text}" for kind, text in KINDS.items() if getattr(self, kind)]
        lines = [f"{self.skipped} lines skipped: {', '.join(parts)}"] if parts else []
        return "; ".join(lines + self.broken_files)


KINDS = {
    "bad_utf8": "invalid UTF-8",
    "bad_json": "ill-formed JSON",
    "no_text": "without a text",
    "bad_lang": "with an unusable lang",
    "empty": "empty",
    "too_long": "too long",
}


def corpus_files(folder: str | Path) -> dict[str, list[Path]]:
    """The corpus files of a folder by stem (``en`` for ``en.jsonl.gz``), in name order.

    Raises UserError where the folder is missing or holds no ``.jsonl`` or ``.jsonl.gz`` file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such corpus folder")
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name.endswith(SUFFIXES) and not path.name.startswith("."):
            files.setdefault(file_stem(path), []).append(path)
    if not files:
        raise UserError(f"{folder}: no .jsonl or .jsonl.gz file in this corpus folder")
    return files


def file_stem(path: Path) -> str:
    """The name without ``.jsonl`` or ``.jsonl.gz``."""
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def read_documents(
    path: str | Path, report: CorpusReport, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[Document]:
    """Stream the documents of a ``.jsonl`` or ``.jsonl.gz`` file, counting in ``report`` what is skipped.

    A document without ``lang`` takes the file's stem. A broken gzip stream gives the documents before the
    break and stands in ``report.broken_files``. Raises UserError where the file cannot be opened.
    """
    path = Path(path)
    stem = file_stem(path)
    for number, line in read_lines(path, report, max_line_bytes):
        if line.strip():
            document = parse_document(line, number, stem, report)
            if document is not None:
                report.read += 1
                yield document


def read_lines(path: Path, report: CorpusReport, limit: int) -> Iterator[tuple[int, bytes]]:
    """Lines of a file (plain, ``.gz``, ``.zst``) with their numbers from 1, each of at most ``limit`` bytes.

    A longer line is skipped and counted without ever being held in memory. A stream that breaks ends there
    and stands in ``report.broken_files``. Raises UserError where the file cannot be opened.
    """
    try:
        stream = open_stream(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    number = 0
    with stream:
        try:
            while line := stream.readline(limit + 1):
                number += 1
                if len(line) > limit and not line.endswith(b"\n"):
                    while rest := stream.readline(limit):
                        if rest.endswith(b"\n"):
                            break
                    report.skip("too_long", number)
                    continue
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            report.broken_files.append(f"broken gzip stream ({str(error).rstrip('.')})")
        except OSError as error:
            report.broken_files.append(f"cannot be read on from line {number + 1} ({error})")
        except Exception as error:
            if type(error).__name__ != "ZstdError":  # of a library that only .zst files need
                raise
            report.broken_files.append(f"broken zstd stream ({error})")


def open_stream(path: Path) -> BinaryIO:
    """Open a file for reading bytes; ``.gz`` and ``.zst`` are decompressed."""
    if path.name.endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.name.endswith(".zst"):
        zstandard = need("zstandard", "data", str(path))
        file = path.open("rb")
        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True, closefd=True)
        return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, reader), 1 << 20))
    return path.open("rb")


def parse_document(
    line: bytes, number: int, stem: str, report: CorpusReport, key: str = "text"
) -> Document | None:
    """The document of one line, its text under ``key``, or None with the reason counted in ``report``."""
    try:
        item = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        report.skip("bad_utf8", number)
        return None
    except (ValueError, RecursionError):
        report.skip("bad_json", number)
        return None
    return checked_document(item, number, stem, report, key)


def checked_document(
    item: object, number: int, stem: str, report: CorpusReport, text_key: str = "text"
) -> Document | None:
    """The document in one row of any format, or None with the reason counted in ``report``."""
    text = item.get(text_key) if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(text, str):
        report.skip("no_text", number)
        return None
    if not text.strip():
        report.skip("empty", number)
        return None
    try:
        text.encode("utf-8")  # JSON can escape half a surrogate pair, which no UTF-8 text holds
    except UnicodeEncodeError:
        report.skip("bad_utf8", number)
        return None
    lang, source = item.get("lang", stem), item.get("source", "")
    if not isinstance(lang, str) or not (lang == "" or is_name(lang)):  # it becomes a directory's name
        report.skip("bad_lang", number)
        return None
    return Document(text, lang, source if isinstance(source, str) else "")


def is_name(text: str) -> bool:
    """Whether a text may become a directory's name."""
    return _SAFE_NAME.fullmatch(text) is not None
