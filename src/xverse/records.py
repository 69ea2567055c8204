"""Records in files: the items of JSON arrays or lines, and the rows of CSV and TSV files, one at a time."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from xverse.config import UserError
from xverse.encodings import UTF8
from xverse.texts import BOM, MAX_LINE_BYTES, ReadReport, json_lines, kind_of, open_binary, open_text


class Damaged(UserError):
    """A file that cannot be read on."""


def read_records(
    path: str | Path,
    report: ReadReport | None = None,
    limit: int = MAX_LINE_BYTES,
    encoding: str | None = None,
) -> Iterator[tuple[int, Any]]:
    """The items of a JSON array, or the values of JSON lines, with their numbers from 1.

    Holds one item or line of at most ``limit`` bytes in memory. Raises Damaged for an array that is not valid
    JSON, with a report too.
    """
    with open_text(path, report, encoding) as stream:
        if stream.peek(1).removeprefix(BOM).lstrip()[:1] == b"[":  # type: ignore[attr-defined]
            yield from enumerate(_array(path, stream, limit), 1)
        else:
            yield from json_lines(path, stream, report, limit)


def _array(path: str | Path, stream: BinaryIO, limit: int) -> Iterator[Any]:
    decoder, scan = json.JSONDecoder(), codecs.getincrementaldecoder(UTF8)("surrogateescape")
    text = scan.decode(stream.read(1 << 16)).removeprefix("\ufeff").lstrip()[1:]
    ended, number = False, 0
    while True:
        text = text.lstrip()
        try:
            if text[:1] == "]":
                if text[1:].strip() or stream.read(1 << 16).strip():
                    raise Damaged(
                        f"{path}: invalid JSON after item {number} (text after the end of the array)"
                    )
                return
            start = text[1:].lstrip() if number and text[:1] == "," else text
            if not start or (number and start is text):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, 0)
            value, end = decoder.raw_decode(start)
            if not start[end : end + 1] and not ended:
                raise json.JSONDecodeError("cut", start, end)
        except (ValueError, RecursionError) as error:
            cut = isinstance(error, json.JSONDecodeError) and (
                error.msg.startswith("Unterminated string") or error.pos > len(text) - 32
            )
            if ended or not cut or len(text) > limit:
                why = "too long" if cut and not ended else getattr(error, "msg", str(error)[:99])
                raise Damaged(f"{path}: invalid JSON in item {number + 1} ({why})") from None
            data = stream.read(max(1 << 16, len(text)))  # doubled, so that a long item costs what it should
            ended = not data
            text += scan.decode(data, final=ended)
            continue
        number += 1
        text = start[end:]
        yield value


def read_csv(
    path: str | Path,
    delimiter: str = ",",
    report: ReadReport | None = None,
    limit: int = MAX_LINE_BYTES,
    encoding: str | None = None,
) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file with the number of their last line from 1; every field is text, as it was
    written.

    Raises Damaged for invalid CSV and, without a report, for a text that cannot be decoded; with one, such a
    field contains lone surrogates.
    """
    csv.field_size_limit(limit)
    with open_text(path, report, encoding) as stream:
        if stream.peek(3)[:3] == BOM:  # type: ignore[attr-defined]
            stream.read(3)
        errors = "strict" if report is None else "surrogateescape"
        lines = io.TextIOWrapper(stream, UTF8, errors=errors, newline="")
        rows = csv.reader(lines, strict=True, delimiter=delimiter)
        try:
            for row in rows:
                yield rows.line_num, row
        except csv.Error as error:
            raise Damaged(f"{path}, line {rows.line_num}: invalid CSV ({error})") from None
        except UnicodeDecodeError:
            raise Damaged(f"{path}: invalid UTF-8 after line {rows.line_num}") from None
        finally:
            if not lines.closed:
                lines.detach()  # the stream is closed by open_text


def read_parquet(
    path: str | Path, choose: Callable[[list[str]], list[str]] = list
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a Parquet file or URL with their numbers from 1; ``choose`` selects columns by name.

    Raises Damaged for a file that cannot be read on, after the rows before the damage. pyarrow, which several
    extras install, must be there.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with open_binary(path) as stream, pyarrow.parquet.ParquetFile(stream) as file:
            columns = choose(file.schema_arrow.names)
            # One row group at a time, so that those before a broken one are not lost.
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=columns):
                    for row in _rows(batch, columns):
                        number += 1
                        yield number, row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise Damaged(f"{path}: broken parquet after row {number} ({why})") from None


def _rows(batch: Any, columns: list[str]) -> list[dict[str, Any]]:
    """The rows of a table; one that is not UTF-8, which the format does not check, has no text."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError:
        half = len(batch) // 2
        if not half:
            return [dict.fromkeys(columns, b"\xff")]
        return [*_rows(batch[:half], columns), *_rows(batch[half:], columns)]
    return rows


def read_table(
    path: str | Path,
    report: ReadReport,
    limit: int = MAX_LINE_BYTES,
    encoding: str | None = None,
    delimiter: str | None = None,
) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a ``.csv`` or ``.tsv`` file under the names of its first row, with their last lines.

    Rows with another number of fields are counted in the report. Raises Damaged for invalid CSV, and
    UserError for names that are missing or repeated.
    """
    if delimiter is None:
        delimiter = "\t" if kind_of(Path(path)) == ".tsv" else ","
    rows = read_csv(path, delimiter, report, limit, encoding)
    names = next((row for _, row in rows if row), [])
    given = [name for name in names if name]  # not that of an index, which pandas writes
    if len(set(given)) < len(given):
        raise UserError(f"{path}: the first row must name the columns, each differently (it has {names})")
    for number, row in rows:
        if len(row) == len(names):
            yield number, dict(zip(names, row, strict=True))
        elif row:
            report.skip("bad_row", number)
