"""Reading text of any kind: the files of a recipe's inputs, and the documents in them.

A ``Unit`` is one file or one shard of a Hugging Face dataset, which one task reads from beginning to end.
Damaged input is skipped and recorded in a ``ReadReport``. Only one line, row or web archive record is held in
memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xverse.config import UserError, choose, need
from xverse.texts import ReadReport, read_jsonl, read_lines, row_text, stem

TEXT_PIECE = 1_000_000  # bytes; a longer text file becomes several documents, split at line ends


_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass
class Document:
    """One text and its language."""

    text: str
    lang: str
    source: str = ""


@dataclass
class Input:
    """A source of text: ``path`` (a file, a folder or a pattern) or ``dataset`` (Hugging Face).

    ``lang`` and ``category`` apply to all of it; without ``lang``, documents declare their language or the
    language stage detects it. ``text_key`` is the column of the text. ``lines``: each line of a text file is
    a document, instead of the whole file. ``format``: jsonl, txt, parquet or warc, if the file name does not
    tell.
    """

    path: str | None = None
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    lang: str | None = None
    category: str | None = None
    source: str | None = None
    text_key: str = "text"
    format: str | None = None
    lines: bool = False

    def __post_init__(self) -> None:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("an input needs either a path or a dataset")
        for name in ("lang", "category"):
            if getattr(self, name) is not None and not is_name(getattr(self, name)):
                raise ValueError(f"{name} '{getattr(self, name)}' cannot be a folder name")


@dataclass
class Unit:
    """One file or dataset shard. ``size``: bytes, 0 if unknown; ``lang``: of text that declares none."""

    name: str
    input: Input
    path: Path | None = None
    shard: int = 0
    shards: int = 1
    size: int = 0
    lang: str = ""


CORPUS_SUFFIXES = (".jsonl", ".jsonl.gz")
FORMATS = {
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz"),
    "txt": (".txt", ".txt.gz", ".txt.zst"),
    "parquet": (".parquet",),
    "warc": (".warc", ".warc.gz", ".wet", ".wet.gz"),
}


def format_of(path: Path) -> str | None:
    """The format according to a file's name."""
    return next((name for name, suffixes in FORMATS.items() if path.name.endswith(suffixes)), None)


def corpus_units(folder: Path) -> list[Unit]:
    """The JSON-lines files of a corpus folder, by name. Raises UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such corpus folder")
    paths = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name.endswith(CORPUS_SUFFIXES) and not path.name.startswith(".")
    ]
    if not paths:
        raise UserError(f"{folder}: no .jsonl or .jsonl.gz file in this corpus folder")
    return [
        Unit(
            path.name, Input(path=str(path), format="jsonl"), path, size=path.stat().st_size, lang=stem(path)
        )
        for path in paths
    ]


def input_units(inputs: list[Input]) -> list[Unit]:
    """All units of a recipe's inputs, in the order of inputs and file names.

    Raises UserError for an input without files and for an unknown format.
    """
    units: list[Unit] = []
    for source in inputs:
        if source.format is not None:
            choose("format", source.format, FORMATS)
        units += _dataset_units(source) if source.dataset else _path_units(source)
    names = [unit.name for unit in units]
    twice = next((name for name in names if names.count(name) > 1), None) if len(names) < 10_000 else None
    if twice is not None:
        raise UserError(f"inputs: '{twice}' is read twice")
    return units


def _path_units(source: Input) -> list[Unit]:
    pattern = str(Path(source.path or "").expanduser())
    root = Path(pattern)
    if root.is_dir():
        paths = sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
        paths = [path for path in paths if source.format or format_of(path)]
    elif root.is_file():
        paths = [root]
    else:
        paths = sorted(path for path in _matches(root) if path.is_file())
    if not paths:
        raise UserError(f"{source.path}: no text files here ({', '.join(FORMATS)})")
    for path in paths:
        if source.format is None and format_of(path) is None:
            raise UserError(f"{path}: unknown format; set format: {' | '.join(FORMATS)}")
    lang = source.lang or ""
    return [Unit(str(path), source, path, size=path.stat().st_size, lang=lang) for path in paths]


def _matches(pattern: Path) -> Iterator[Path]:
    """The paths that match a pattern such as ``web/**/*.warc.gz``."""
    parts = pattern.parts
    first = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    if first < len(parts):
        yield from Path(*parts[:first]).glob("/".join(parts[first:]))


def _dataset_units(source: Input) -> list[Unit]:
    shards = _dataset(source).num_shards
    name = "/".join(filter(None, (source.dataset, source.config, source.split, source.revision)))
    lang = source.lang or ""
    return [Unit(f"{name}/{i}", source, shard=i, shards=shards, lang=lang) for i in range(shards)]


def _dataset(source: Input) -> Any:
    datasets = need("datasets", "data", f"dataset {source.dataset}")
    try:
        return datasets.load_dataset(
            source.dataset, source.config, split=source.split, revision=source.revision, streaming=True
        )
    except (OSError, ValueError, ConnectionError) as error:
        raise UserError(f"dataset {source.dataset}: {' '.join(str(error).split())[:300]}") from None


def read_unit(unit: Unit, report: ReadReport, max_line_bytes: int) -> Iterator[Document]:
    """The documents of a unit. ``lang`` is empty if neither the document nor the input declares it."""
    if unit.path is None:
        documents = _read_dataset(unit, report)
    else:
        kind = unit.input.format or format_of(unit.path)
        assert kind is not None, unit.name
        documents = _READERS[kind](unit, report, max_line_bytes)
    for document in documents:
        report.read += 1
        document.lang = unit.input.lang or document.lang
        document.source = unit.input.source or document.source
        yield document


def _document(row: Any, number: int, unit: Unit, report: ReadReport) -> Document | None:
    """The document in a row of any format; None, counted in the report, where it is unusable."""
    text = row_text(row, number, report, unit.input.text_key)
    if text is None:
        return None
    lang, source = row.get("lang", unit.lang), row.get("source", "")
    if not isinstance(lang, str) or not (lang == "" or is_name(lang)):
        report.skip("bad_lang", number)
        return None
    return Document(text, lang, source if isinstance(source, str) else "")


def is_name(text: str) -> bool:
    """Whether a text may become a directory's name."""
    return _SAFE_NAME.fullmatch(text) is not None


def _read_jsonl(unit: Unit, report: ReadReport, limit: int) -> Iterator[Document]:
    assert unit.path is not None
    for number, row in read_jsonl(unit.path, report, limit):
        if (document := _document(row, number, unit, report)) is not None:
            yield document


def _read_txt(unit: Unit, report: ReadReport, limit: int) -> Iterator[Document]:
    assert unit.path is not None
    piece: list[str] = []
    size = 0
    for number, line in read_lines(unit.path, report, limit):
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


def _read_parquet(unit: Unit, report: ReadReport, limit: int) -> Iterator[Document]:
    need("pyarrow", "data", str(unit.path))
    import pyarrow
    import pyarrow.parquet

    key, number = unit.input.text_key, 0
    try:
        with pyarrow.parquet.ParquetFile(unit.path) as file:
            columns = [name for name in (key, "lang", "source") if name in file.schema_arrow.names]
            if key not in columns:
                known = ", ".join(file.schema_arrow.names)
                raise UserError(f"{unit.path}: no column '{key}' (it has {known}); set text_key")
            # One row group at a time, so that those before a broken one are not lost.
            batches = (
                batch
                for group in range(file.num_row_groups)
                for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=columns)
            )
            for batch in batches:
                for row in batch.to_pylist():
                    number += 1
                    row = {name: value for name, value in row.items() if value is not None}
                    document = _document(row, number, unit, report)
                    if document is not None and len(document.text) > limit:
                        report.skip("too_long", number)
                    elif document is not None:
                        yield document
    except (pyarrow.ArrowException, OSError) as error:
        why = " ".join(str(error).split())[:200]
        report.broken_files.append(f"broken parquet after row {number} ({why})")


def _read_warc(unit: Unit, report: ReadReport, limit: int) -> Iterator[Document]:
    assert unit.path is not None
    need("warcio", "data", str(unit.path))
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    assert unit.path is not None
    number = 0
    with unit.path.open("rb") as file:
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
                text = _page_text(data) if page else data.decode("utf-8", errors="replace")
                if text is None or not text.strip():
                    report.skip("empty", number)
                    continue
                yield Document(text, unit.lang, unit.input.source or "web")
        except (ArchiveLoadFailed, EOFError, OSError, ValueError) as error:
            why = " ".join(str(error).split())[:200]
            report.broken_files.append(f"broken web archive at record {number} ({why})")


def _page_text(data: bytes) -> str | None:
    trafilatura = need("trafilatura", "data", "reading web archives")
    text: str | None = trafilatura.extract(data, include_comments=False, deduplicate=False)
    return text


def _read_dataset(unit: Unit, report: ReadReport) -> Iterator[Document]:
    rows = _dataset(unit.input).shard(unit.shards, unit.shard)
    if unit.input.text_key not in (rows.column_names or [unit.input.text_key]):
        known = ", ".join(rows.column_names)
        raise UserError(f"{unit.name}: no column '{unit.input.text_key}' (it has {known}); set text_key")
    for number, row in enumerate(rows, 1):
        row = {name: value for name, value in row.items() if value is not None}
        document = _document(row, number, unit, report)
        if document is not None:
            yield document


_READERS: dict[str, Callable[[Unit, ReadReport, int], Iterator[Document]]] = {
    "jsonl": _read_jsonl,
    "txt": _read_txt,
    "parquet": _read_parquet,
    "warc": _read_warc,
}
