"""Reading text, JSON and JSON lines: the only module that opens, decompresses and decodes such files.

Files are local or at a URL (``remote.py``), plain or compressed (``.gz``, ``.zst``), in UTF-8 or in an
encoding that ``encodings.py`` detects, with or without a byte order mark. Without a ``report``, a function
raises UserError at the first problem, naming the file and the line. With one, it skips damaged input, counts
it in the report and holds no more than one line, or 64 KB of a text file, in memory.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from xverse.config import UserError, is_url, need
from xverse.encodings import UTF8, check_encoding, converted, detect, resolve, transcoded

BOM = b"\xef\xbb\xbf"
COMPRESSED = (".gz", ".zst")
TEXT_KINDS = (".txt", ".jsonl")
MAX_LINE_BYTES = 64_000_000
BLOCK = 1 << 16  # bytes of a .txt file that make one text
LONGEST_TEXT_LINE = 1 << 20
LISTED = 1_000  # skipped lines that are listed, of each file; the others are only counted

KINDS = {
    "bad_utf8": "invalid UTF-8",
    "bad_json": "invalid JSON",
    "no_text": "without a text",
    "not_text": "with a number, list or object for the text",
    "bad_lang": "with an unusable lang",
    "empty": "empty",
    "too_long": "too long",
    "bad_row": "with another number of fields",
}


@dataclass
class ReadReport:
    """What was read from a file and what was skipped, in lines.

    ``bad_lines``: the first skipped lines, as (line from 1, reason); ``broken_files``: how a file breaks off;
    ``encoding``: that of the file, if it is not UTF-8; ``keys``: those of the first row without a text.
    """

    read: int = 0
    bytes: int = 0
    bad_utf8: int = 0
    bad_json: int = 0
    no_text: int = 0
    not_text: int = 0
    bad_lang: int = 0
    empty: int = 0
    too_long: int = 0
    bad_row: int = 0
    encoding: str = ""
    keys: str = ""
    broken_files: list[str] = field(default_factory=list)
    bad_lines: list[tuple[int, str]] = field(default_factory=list)

    @property
    def skipped(self) -> int:
        return sum(getattr(self, kind) for kind in KINDS)

    def skip(self, kind: str, line: int) -> None:
        """Count a skipped line; ``kind`` is a key of KINDS."""
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.bad_lines) < LISTED:
            self.bad_lines.append((line, self._reason(kind)))

    def _reason(self, kind: str) -> str:
        return f"invalid {self.encoding}" if kind == "bad_utf8" and self.encoding else KINDS[kind]

    def describe(self) -> str:
        """One line such as ``2 lines skipped: 1 invalid UTF-8, 1 invalid JSON``; empty if all was well."""
        parts = [f"{getattr(self, kind)} {self._reason(kind)}" for kind in KINDS if getattr(self, kind)]
        lines = [f"{self.skipped} lines skipped: {', '.join(parts)}"] if parts else []
        if self.keys:
            lines.append(self.keys)
        elif self.bad_utf8 == self.skipped > self.read and not self.encoding:
            lines.append("name the encoding, such as encoding: gb18030")
        return "; ".join(lines + self.broken_files)


def stem(path: str | Path) -> str:
    """A file's name without its format and compression: ``en`` of en.jsonl.gz."""
    name = Path(path).name
    for suffix in (*COMPRESSED, *TEXT_KINDS, ".json"):
        name = name[: -len(suffix)] if name.lower().endswith(suffix) else name
    return name


def kind_of(path: Path) -> str:
    """The format's suffix of a name, without compression: ``.jsonl`` of en.jsonl.gz."""
    suffix = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if suffix in COMPRESSED else suffix


def find_files(names: Iterable[str | Path]) -> list[Path]:
    """The named files; of a folder, the text files in it, by name.

    Raises UserError for a file that is missing, unreadable or of another kind, and for a folder without any.
    """
    paths: list[Path] = []
    for path in map(Path, names):
        if path.is_dir():
            visible = sorted(file for file in path.iterdir() if not file.name.startswith("."))
            files = [file for file in visible if kind_of(file) in TEXT_KINDS]
            if not files:
                raise UserError(f"{path}: no .txt or .jsonl files in this folder")
        else:
            files = [path]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file}: no such file")
            if not os.access(file, os.R_OK):
                raise UserError(f"{file}: cannot be read (no permission)")
            if kind_of(file) not in TEXT_KINDS:
                raise UserError(f"{file}: expected a .txt or .jsonl file, plain or compressed (.gz, .zst)")
        paths += files
    return paths


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder that it is in, is hidden, such as ``.git``."""
    return any(part.startswith(".") for part in name.split("/"))


def files_below(root: Path) -> list[Path]:
    """The files in a folder that are not hidden, by path; follows links to folders, each folder once."""
    seen, found = {os.path.realpath(root)}, []
    for folder, folders, files in os.walk(root, followlinks=True):
        targets = {name: os.path.realpath(Path(folder, name)) for name in sorted(folders)}
        folders[:] = [name for name, to in targets.items() if not is_hidden(name) and to not in seen]
        seen.update(targets[name] for name in folders)
        found += [Path(folder, name) for name in files if not is_hidden(name)]
    return sorted(filter(Path.is_file, found))


def open_binary(path: str | Path) -> BinaryIO:
    """Open a file or URL for reading. What is compressed, by its name or its first bytes, is decompressed.

    Raises UserError if that fails.
    """
    name = (str(path).partition("?")[0] if is_url(path) else str(path)).lower()
    try:
        file = _open(path)
        head = b"" if name.endswith(COMPRESSED) else file.peek(4)[:4]  # type: ignore[attr-defined]
        if name.endswith(".gz") or head[:3] == b"\x1f\x8b\x08":
            return cast(BinaryIO, _Gzip(file))
        if name.endswith(".zst") or head == b"\x28\xb5\x2f\xfd":
            return converted(file, _unzstd(file, need("zstandard", "data", str(path))))
        return file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _unzstd(stream: BinaryIO, zstandard: Any) -> Iterator[bytes]:
    frame = None
    while data := stream.read(1 << 11):  # little, because a block of a few bytes may be 128 KB of text
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(data)
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise zstandard.ZstdError("it is cut short")


class _Gzip(gzip.GzipFile):
    """Closes its stream with it."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(fileobj=stream, mode="rb")
        self.myfileobj = stream  # type: ignore[assignment]  # what GzipFile closes


def _open(path: str | Path) -> BinaryIO:
    if is_url(path):
        from xverse.remote import open_url

        return open_url(str(path))
    return Path(path).open("rb", buffering=1 << 16)


@contextlib.contextmanager
def open_text(
    path: str | Path, report: ReadReport | None = None, encoding: str | None = None
) -> Iterator[BinaryIO]:
    """A file as a stream in UTF-8, from ``encoding`` (None: detected), which the report records.

    Errors of a damaged file are handled as by ``_damage``.
    """
    with _damage(path, report), open_binary(path) as stream:
        given = check_encoding(encoding) if encoding else None
        head: bytes | None = None
        with _damage(path, report):
            head = stream.peek(1 << 16)[: 1 << 16]  # type: ignore[attr-defined]
        if head is None:  # broken from the beginning, as the report says
            yield cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, io.BytesIO())))
            return
        found = resolve(given, head) if given else detect(head)
        if found == UTF8:
            yield stream
            return
        if report is not None:
            report.encoding = found
        elif given is None:
            from xverse.log import notice  # here, because it imports rich

            notice(f"{path}: read as {found}")
        with transcoded(stream, found) as text:
            yield text


@contextlib.contextmanager
def _damage(path: str | Path, report: ReadReport | None) -> Iterator[None]:
    """Record in the report that a compressed stream breaks off.

    Raises UserError for I/O errors, and for a broken stream without a report.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (EOFError, gzip.BadGzipFile, zlib.error)):
            reason = f"broken gzip stream ({str(error).rstrip('.')})"
        elif type(error).__name__ == "ZstdError":  # of a library that only .zst files need
            reason = f"broken zstd stream ({error})"
        elif isinstance(error, OSError):
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        else:
            raise
        if report is None:
            raise UserError(f"{path}: {reason}") from None
        report.broken_files.append(reason)


def read_text(path: str | Path) -> str:
    """The whole text of a file. Raises UserError where it cannot be read or decoded."""
    with open_text(path) as stream:
        data = stream.read()
    try:
        return data.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: invalid UTF-8 at byte {error.start}") from None


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of a JSON text; ``where`` names its source. Raises UserError for invalid JSON or UTF-8."""
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text)
    except UnicodeDecodeError:
        raise UserError(f"{where}: invalid UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: invalid JSON ({error})") from None


def read_json(path: str | Path) -> Any:
    """The value of a JSON file. Raises UserError where it cannot be read or is not valid."""
    text = read_text(path)
    value = parse_json(text, str(path))
    if "\\ud" in text.lower() and not encodable(json.dumps(value, ensure_ascii=False)):
        raise UserError(f"{path}: invalid JSON (half a surrogate pair, which no text can hold)")
    return value


def read_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if it cannot be read or holds anything else."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def read_jsonl(
    path: str | Path,
    report: ReadReport | None = None,
    limit: int = MAX_LINE_BYTES,
    encoding: str | None = None,
) -> Iterator[tuple[int, Any]]:
    """The values of a JSON-lines file with their line numbers from 1; blank lines are ignored."""
    with open_text(path, report, encoding) as stream:
        yield from json_lines(path, stream, report, limit)


def json_lines(
    path: str | Path, stream: BinaryIO, report: ReadReport | None, limit: int
) -> Iterator[tuple[int, Any]]:
    """The values of the JSON lines in a stream, with their line numbers from 1."""
    for number, line in _lines(path, stream, report, limit):
        if line.strip():
            try:
                yield number, json.loads(line.decode())
            except UnicodeDecodeError:
                _skip(report, "bad_utf8", path, number)
            except (ValueError, RecursionError) as error:
                _skip(report, "bad_json", path, number, f" ({error})")


def read_text_lines(path: str | Path) -> Iterator[str]:
    """The lines of a text file without their ends. A line ends at a line feed, before which a carriage return
    is dropped; other separators of Unicode, such as U+2028, are part of the text."""
    for line in read_text(path).split("\n"):
        yield line.removesuffix("\r")


def describe_type(value: Any) -> str:
    """What a value is, in the words of JSON."""
    kinds = {type(None): "missing", bool: "true or false", int: "a number", float: "a number"}
    kinds |= {list: "a list", dict: "an object", str: "a text"}
    return kinds.get(type(value), f"of type {type(value).__name__}")


def read_lines(
    path: str | Path,
    report: ReadReport | None = None,
    limit: int = MAX_LINE_BYTES,
    encoding: str | None = None,
) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers from 1, each of at most ``limit`` bytes.

    A longer line is skipped without being held in memory; a stream that breaks ends there. Raises UserError
    where the file cannot be opened, and without a report in those two cases.
    """
    with open_text(path, report, encoding) as stream:
        yield from _lines(path, stream, report, limit)


def _lines(
    path: str | Path, stream: BinaryIO, report: ReadReport | None, limit: int
) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := stream.readline(limit + 1):
        number += 1
        if len(line) > limit and not line.endswith(b"\n"):
            while (rest := stream.readline(limit)) and not rest.endswith(b"\n"):
                pass
            _skip(report, "too_long", path, number)
            continue
        yield number, line.removeprefix(BOM) if number == 1 else line


def _skip(report: ReadReport | None, kind: str, path: str | Path, number: int, detail: str = "") -> None:
    if report is None:
        raise UserError(f"{path}, line {number}: {KINDS[kind]}{detail}") from None
    report.skip(kind, number)


def row_text(row: object, number: int, report: ReadReport, key: str = "text") -> str | None:
    """The text under ``key`` of a row of any format; None, counted in the report, where it has none."""
    text = row.get(key) if isinstance(row, dict) else None
    if isinstance(text, bytes):  # of a parquet file
        text = text.decode("utf-8", "surrogateescape")
    if text is None:
        report.skip("no_text", number)
        report.keys = report.keys or _hint(row, number, key)
    elif not isinstance(text, str):
        report.skip("not_text", number)
    elif not text.strip():
        report.skip("empty", number)
    elif not encodable(text):
        report.skip("bad_utf8", number)
    else:
        return text
    return None


def _hint(row: object, number: int, key: str) -> str:
    """How to name the column of the text, if a row without it has others that may be it."""
    others = (
        [str(name) for name, value in row.items() if isinstance(value, str)] if isinstance(row, dict) else []
    )
    shown = ", ".join(name for name in others[:10] if name not in ("lang", "source"))[:200]
    return (
        f"line {number} has no '{key}' but {shown}: set text_key under inputs"
        if shown and key not in others
        else ""
    )


def encodable(text: str) -> bool:
    """Whether UTF-8 can hold a text: JSON can escape half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def load_texts(path: str | Path) -> list[str]:
    """All texts of a file: a ``.txt`` file is one, each line of a ``.jsonl`` file has one under "text".

    Raises UserError for anything that is not as described, and for a file without text.
    """
    path = Path(path)
    if kind_of(path) == ".jsonl":
        texts = []
        for number, row in read_jsonl(path):
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise UserError(f'{path}, line {number}: expected a JSON object with a "text"')
            texts.append(row["text"])
    else:
        texts = [read_text(path)]
    if not any(text.strip() for text in texts):
        raise UserError(f"{path}: is empty")
    return texts


def read_texts(path: Path, report: ReadReport, begin: int = 0, end: int = -1) -> Iterator[bytes]:
    """The texts of a file in valid UTF-8, none empty: each line of ``.jsonl``, otherwise blocks of 64 KB.

    A block ends at a line's end; a line above 1 MB is cut between characters. ``begin`` and ``end`` (-1: all)
    choose the lines of an uncompressed .txt file that begin in these bytes. Raises UserError where the file
    cannot be read.
    """
    if kind_of(path) == ".jsonl":
        rows = read_jsonl(path, report)
        values = (row_text(row, number, report) for number, row in rows)
        blocks: Iterator[bytes] = (value.encode() for value in values if value is not None)
    else:
        blocks = _blocks(path, report, begin, end)
    for block in blocks:
        report.read += 1
        report.bytes += len(block)
        yield block


def _blocks(path: Path, report: ReadReport, begin: int, end: int) -> Iterator[bytes]:
    with open_text(path, report) as stream:
        if report.encoding:  # its places are not those of UTF-8, so the first part reads everything
            if begin:
                return
            end = -1
        for number, block in enumerate(_cut(stream, begin, end)):
            if number == begin == 0 and not (block := block.removeprefix(BOM)):
                continue
            if _is_utf8(block):
                yield block
                continue
            lines = block.splitlines(keepends=True)
            valid = [line for line in lines if _is_utf8(line)]
            report.bad_utf8 += len(lines) - len(valid)
            if valid:
                yield b"".join(valid)


def _cut(stream: BinaryIO, at: int, end: int) -> Iterator[bytes]:
    if at:  # an unfinished line belongs to the span before
        stream.seek(at - 1)
        while (line := stream.readline(LONGEST_TEXT_LINE)) and not line.endswith(b"\n"):
            pass
        at = stream.tell()
    unfinished = False  # a line that began in this span and was cut
    while end < 0 or at < end or unfinished:
        block = stream.read(BLOCK if end < 0 else min(BLOCK, max(end - at, 0)))
        if not block.endswith(b"\n"):
            block += stream.readline(LONGEST_TEXT_LINE)
            if not block.endswith(b"\n"):
                block += _rest_of_character(stream)
        if not block:
            return
        at, unfinished = at + len(block), not block.endswith(b"\n")
        yield block


def _rest_of_character(stream: BinaryIO) -> bytes:
    """The bytes up to the next character, so that a cut in a long line falls between characters."""
    rest = b""
    while len(rest) < 3 and (following := stream.peek(1)[:1]):  # type: ignore[attr-defined]
        if following[0] & 0xC0 != 0x80:
            break
        rest += stream.read(1)
    return rest


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
