"""Reading text corpora: a folder of JSON-lines files, ``{"text", "lang", "source"}`` on each line."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from xverse.config import UserError

SUFFIXES = (".jsonl", ".jsonl.gz")
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass
class Document:
    """One text and the language it is in."""

    text: str
    lang: str
    source: str = ""


@dataclass
class CorpusReport:
    """What was read and what was skipped, in lines."""

    read: int = 0
    bad_utf8: int = 0
    bad_json: int = 0
    no_text: int = 0
    bad_lang: int = 0
    empty: int = 0
    broken_files: list[str] = field(default_factory=list)

    @property
    def skipped(self) -> int:
        return self.bad_utf8 + self.bad_json + self.no_text + self.bad_lang + self.empty

    def describe(self) -> str:
        """One line such as ``2 lines skipped: 1 invalid UTF-8, 1 ill-formed JSON``; empty if all was well."""
        kinds = {
            "invalid UTF-8": self.bad_utf8,
            "ill-formed JSON": self.bad_json,
            "without a text": self.no_text,
            "with an unusable lang": self.bad_lang,
            "empty": self.empty,
        }
        parts = [f"{count} {kind}" for kind, count in kinds.items() if count]
        lines = [f"{self.skipped} lines skipped: {', '.join(parts)}"] if parts else []
        return "; ".join(lines + self.broken_files)


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


def read_documents(path: str | Path, report: CorpusReport) -> Iterator[Document]:
    """Stream the documents of a ``.jsonl`` or ``.jsonl.gz`` file, counting in ``report`` what is skipped.

    A document without ``lang`` takes the file's stem. A broken gzip stream gives the documents before the
    break and is named in ``report.broken_files``. Raises UserError where the file cannot be opened.
    """
    path = Path(path)
    stem = file_stem(path)
    try:
        opener = gzip.open if path.name.endswith(".gz") else open
        stream = cast(BinaryIO, opener(path, "rb"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    with stream:
        try:
            for number, line in enumerate(stream):
                if number == 0:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                document = _parse(line, stem, report)
                if document is not None:
                    report.read += 1
                    yield document
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            report.broken_files.append(f"{path.name}: broken gzip stream ({str(error).rstrip('.')})")


def _parse(line: bytes, stem: str, report: CorpusReport) -> Document | None:
    try:
        item = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        report.bad_utf8 += 1
        return None
    except (ValueError, RecursionError):
        report.bad_json += 1
        return None
    text = item.get("text") if isinstance(item, dict) else None
    if not isinstance(text, str):
        report.no_text += 1
        return None
    if not text.strip():
        report.empty += 1
        return None
    try:
        text.encode("utf-8")  # JSON can escape half a surrogate pair, which no UTF-8 text holds
    except UnicodeEncodeError:
        report.bad_utf8 += 1
        return None
    lang, source = item.get("lang", stem), item.get("source", "")
    if not isinstance(lang, str) or not _SAFE_NAME.fullmatch(lang):  # it becomes a directory's name
        report.bad_lang += 1
        return None
    return Document(text, lang, source if isinstance(source, str) else "")
