"""Reading documents from files of any format.

A ``Unit`` is one file or one shard of a Hugging Face dataset. Damaged input is skipped and recorded in a
``ReadReport``. Only one line, row or web archive record is held in memory. All formats agree: a text that is
null or missing is "without a text", another value "not a text"; the input's ``lang`` counts before the
document's, and a null or missing one is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from xverse.config import UserError, is_url, need
from xverse.data.prepare.inputs import Unit, dataset_of, is_name
from xverse.records import Damaged, read_parquet, read_records, read_table
from xverse.remote import open_url
from xverse.texts import ReadReport, read_lines, row_text

TEXT_PIECE = 1_000_000  # bytes; a longer text file becomes several documents, split at line ends


@dataclass
class Document:
    """One text and its language."""

    text: str
    lang: str
    source: str = ""


def read_unit(unit: Unit, report: ReadReport, max_line_bytes: int) -> Iterator[Document]:
    """The documents of a unit. ``lang`` is empty if neither the document nor the input declares it."""
    for document in _READERS[unit.format](unit, report, max_line_bytes):
        report.read += 1
        document.lang = unit.input.lang or document.lang
        document.source = unit.input.source or document.source
        yield document


def _documents(
    rows: Iterable[tuple[int, Any]], unit: Unit, report: ReadReport, limit: int
) -> Iterator[Document]:
    """The documents in rows of any format; unusable ones are counted in the report."""
    for number, row in rows:
        text = row_text(row, number, report, unit.input.text_key)
        if text is None:
            continue
        if 4 * len(text) > limit and len(text.encode()) > limit:
            report.skip("too_long", number)
            continue
        lang, source = row.get("lang"), row.get("source")
        if lang is None or lang == "" or unit.input.lang:
            lang = unit.lang
        elif not isinstance(lang, str) or not is_name(lang):
            report.skip("bad_lang", number)
            continue
        yield Document(text, lang, source if isinstance(source, str) else "")


def _read_jsonl(unit: Unit, report: ReadReport, limit: int) -> Iterator[Document]:
    assert unit.path is not None
    try:
        rows = read_records(unit.path, report, limit, unit.input.encoding)
        yield from _documents(rows, unit, report, limit)
    except Damaged as error:
        report.broken_files.append(_without_path(error, unit.path))


def _read_csv(unit: Unit, report: ReadReport, limit: int) -> Iterator[Document]:
    assert unit.path is not None
    delimiter = "\t" if unit.format == "tsv" else ","
    try:
        rows = read_table(unit.path, report, limit, unit.input.encoding, delimiter)
        yield from _documents(_with_column(rows, unit), unit, report, limit)
    except Damaged as error:
        report.broken_files.append(_without_path(error, unit.path))


def _without_path(error: UserError, path: str) -> str:
    return str(error).removeprefix(path).lstrip(":, ")


def _with_column(rows: Iterator[tuple[int, dict[str, str]]], unit: Unit) -> Iterator[tuple[int, Any]]:
    for number, row in rows:
        check_column(unit, row)
        yield number, row


def check_column(unit: Unit, columns: Iterable[str]) -> None:
    """Raise UserError if a table has no column of the text."""
    columns = list(columns)
    if unit.input.text_key not in columns:
        known = ", ".join(columns)
        raise UserError(f"{unit.name}: no column '{unit.input.text_key}' (it has {known}); set text_key")


def _read_txt(unit: Unit, report: ReadReport, limit: int) -> Iterator[Document]:
    assert unit.path is not None
    piece: list[str] = []
    size = 0
    for number, line in read_lines(unit.path, report, limit, unit.input.encoding):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            report.skip("bad_utf8", number)
            continue
        piece.append(text)
        size += len(line)
        if unit.input.lines or size >= TEXT_PIECE:
            if "".join(piece).strip():
                yield Document("".join(piece).strip("\r\n"), unit.lang)
            piece, size = [], 0
    if "".join(piece).strip():
        yield Document("".join(piece).strip("\r\n"), unit.lang)


def _open(unit: Unit) -> Any:
    assert unit.path is not None
    return open_url(unit.path) if is_url(unit.path) else open(unit.path, "rb")  # noqa: PTH123


def _read_parquet(unit: Unit, report: ReadReport, limit: int) -> Iterator[Document]:
    assert unit.path is not None
    need("pyarrow", "data", unit.path, load=False)

    def choose(names: list[str]) -> list[str]:
        check_column(unit, names)
        return [name for name in (unit.input.text_key, "lang", "source") if name in names]

    try:
        yield from _documents(read_parquet(unit.path, choose), unit, report, limit)
    except Damaged as error:
        report.broken_files.append(_without_path(error, unit.path))


def _read_warc(unit: Unit, report: ReadReport, limit: int) -> Iterator[Document]:
    need("warcio", "data", str(unit.path))
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    number = 0
    with _open(unit) as file:
        try:
            for record in ArchiveIterator(file):
                number += 1
                page = record.rec_type == "response"
                if not page and record.rec_type != "conversion":
                    continue
                if page and "html" not in (record.http_headers.get_header("Content-Type") or "html"):
                    continue
                data = record.content_stream().read(limit + 1)
                if len(data) <= limit and record.raw_stream.limit > 0:
                    raise EOFError(f"truncated by {record.raw_stream.limit} bytes")
                if len(data) > limit:
                    report.skip("too_long", number)
                    continue
                if page:
                    trafilatura = need("trafilatura", "data", "reading web archives")
                    text = trafilatura.extract(data, include_comments=False, deduplicate=False)
                else:
                    text = data.decode("utf-8", errors="replace")
                if text is None or not text.strip():
                    report.skip("empty", number)
                    continue
                yield Document(text, unit.lang, unit.input.source or "web")
        except (ArchiveLoadFailed, EOFError, OSError, ValueError) as error:
            why = " ".join(str(error).split())[:200]
            report.broken_files.append(f"broken web archive at record {number} ({why})")


def _read_dataset(unit: Unit, report: ReadReport, limit: int) -> Iterator[Document]:
    rows = dataset_of(unit.input).shard(unit.shards, unit.shard)
    check_column(unit, rows.column_names or [unit.input.text_key])
    yield from _documents(enumerate(rows, 1), unit, report, limit)


_READERS: dict[str, Callable[[Unit, ReadReport, int], Iterator[Document]]] = {
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "tsv": _read_csv,
    "txt": _read_txt,
    "parquet": _read_parquet,
    "warc": _read_warc,
    "dataset": _read_dataset,
}
