"""The inputs of a recipe and the files in them: folders, patterns, URLs and datasets of Hugging Face."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xverse.config import UserError, choose, is_url, need
from xverse.encodings import check_encoding
from xverse.remote import find
from xverse.texts import ReadReport, files_below, is_hidden, open_text, stem

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
FORMATS = {
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst"),
    "csv": (".csv", ".csv.gz", ".csv.zst"),
    "tsv": (".tsv", ".tsv.gz", ".tsv.zst"),
    "txt": (".txt", ".txt.gz", ".txt.zst"),
    "parquet": (".parquet",),
    "warc": (".warc", ".warc.gz", ".wet", ".wet.gz"),
}
CORPUS_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
# The options of an input that only some formats have; "dataset": one of Hugging Face.
OPTIONS = {
    "text_key": ("jsonl", "csv", "tsv", "parquet", "dataset"),
    "encoding": ("jsonl", "csv", "tsv", "txt"),
    "lines": ("txt",),
    "config": ("dataset",),
    "split": ("dataset",),
    "revision": ("dataset",),
}


@dataclass
class Input:
    """A source of text: ``path`` (a file, a folder, a pattern or a URL) or ``dataset`` (Hugging Face).

    ``lang`` and ``category`` apply to all of it, whatever its documents declare; without ``lang``, they
    declare their language or the language stage detects it. ``text_key`` is the column of the text.
    ``lines``: each line of a text file is a document, instead of the whole file. ``format``: a key of
    FORMATS, if the file name does not tell. ``encoding``: that of its text files, if it is not detected.
    """

    URLS = ("path",)

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
    encoding: str | None = None

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.dataset):
            raise ValueError("an input needs either a path or a dataset")
        for name in ("lang", "category"):
            if getattr(self, name) is not None and not is_name(getattr(self, name)):
                raise ValueError(f"{name} '{getattr(self, name)}' cannot be a folder name")
        if self.dataset is not None and self.format is not None:
            raise ValueError("format is an option of path, not of dataset")
        if self.encoding is not None:
            check_encoding(self.encoding)


@dataclass
class Unit:
    """One file or dataset shard. ``path``: a path or URL; ``size``: bytes, 0 if unknown; ``lang``: of text
    that declares none."""

    name: str
    input: Input
    path: str | None = None
    shard: int = 0
    shards: int = 1
    size: int = 0
    lang: str = ""

    @property
    def format(self) -> str:
        """A key of FORMATS, or ``dataset``."""
        return "dataset" if self.path is None else self.input.format or format_of(self.path) or ""


def is_name(text: str) -> bool:
    """Whether a text may become a directory's name."""
    return _SAFE_NAME.fullmatch(text) is not None


def format_of(name: str) -> str | None:
    """The format according to a file's name."""
    name = (name.partition("?")[0] if is_url(name) else name).lower()
    return next((kind for kind, suffixes in FORMATS.items() if name.endswith(suffixes)), None)


def corpus_units(folder: str | Path) -> list[Unit]:
    """The JSON-lines files of a corpus folder, by name. Raises UserError if there are none."""
    source = Input(path=str(folder), format="jsonl")
    if not is_url(folder) and not Path(folder).expanduser().is_dir():
        raise UserError(f"{folder}: no such corpus folder")
    top = [(name, path, size) for name, path, size in _listed(source) if "/" not in name]
    files = [file for file in top if file[0].endswith(CORPUS_SUFFIXES)]
    if not files:
        others = [name for name, _, _ in top if format_of(name)]
        hint = f"; for {others[0]} and the like, write inputs: [{{path: {folder}}}]" if others else ""
        raise UserError(f"{folder}: no .jsonl or .jsonl.gz file in this corpus folder{hint}")
    return [Unit(name, source, path, size=size, lang=stem(name)) for name, path, size in files]


def input_units(inputs: list[Input]) -> list[Unit]:
    """All units of a recipe's inputs, in the order of inputs and file names.

    Raises UserError for an input without files, for an unknown format, and for an option that no file of its
    input has.
    """
    units: list[Unit] = []
    for source in inputs:
        if source.format is not None:
            choose("format", source.format, FORMATS)
        found = _dataset_units(source) if source.dataset else _path_units(source)
        _check_options(source, {unit.format for unit in found})
        units += found
    name, times = next(iter(Counter(unit.name for unit in units).most_common(1)), ("", 0))
    if times > 1:
        raise UserError(f"inputs: '{name}' is read twice")
    return units


def _check_options(source: Input, formats: set[str]) -> None:
    for name, those in OPTIONS.items():
        if getattr(source, name) != getattr(Input, name) and formats.isdisjoint(those):
            raise UserError(
                f"{source.path or source.dataset}: {name} applies to {', '.join(those)}, and this input is "
                f"{', '.join(sorted(formats))}"
            )


def _path_units(source: Input) -> list[Unit]:
    files = list(_listed(source))
    single = len(files) == 1 and files[0][0] == ""
    if not single:
        files = [file for file in files if source.format or _readable(file[1], source)]
    if not files:
        raise UserError(f"{source.path}: no text files here ({', '.join(FORMATS)})")
    for _, path, _ in files:
        if source.format is None and format_of(path) is None:
            raise UserError(f"{path}: unknown format; set format: {' | '.join(FORMATS)}")
    return [Unit(path, source, path, size=size, lang=source.lang or "") for _, path, size in files]


def _listed(source: Input) -> Iterator[tuple[str, str, int]]:
    """Name below the folder (empty for a single file), path and size of an input's files, by path."""
    assert source.path is not None
    if is_url(source.path):
        found = find(source.path)
        if [path for path, _ in found] == [source.path]:
            found = [(source.path, found[0][1])]
            yield "", *found[0]
            return
        base = source.path.rstrip("/") + "/"
        for path, size in found:
            name = path.removeprefix(base)
            if not is_hidden(name):
                yield name, path, size
        return
    root = Path(source.path).expanduser()
    if root.is_file():
        yield "", str(root), root.stat().st_size
        return
    for file in files_below(root) if root.is_dir() else sorted(filter(Path.is_file, _matches(root))):
        below = file.relative_to(root).as_posix() if root.is_dir() else str(file)
        yield below, str(file), file.stat().st_size


def _readable(path: str, source: Input) -> bool:
    """Whether a folder's or pattern's file is text; a .json file only if it is an array or has rows."""
    pattern = bool(set(source.path or "") & set("*?["))
    if format_of(path) is None or pattern or not path.endswith(".json"):
        return pattern or format_of(path) is not None
    with open_text(path, ReadReport(), source.encoding) as stream:
        head = stream.readline(1 << 20).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"["):
        return True
    try:
        row = json.loads(head)
    except ValueError:
        return False
    return isinstance(row, dict) and source.text_key in row


def _matches(pattern: Path) -> Iterator[Path]:
    """The paths that match a pattern such as ``web/**/*.warc.gz``."""
    parts = pattern.parts
    first = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    if first < len(parts):
        base, wanted = Path(*parts[:first]), "/".join(parts[first:])
        for path in base.glob(wanted):
            if wanted.startswith(".") or "/." in wanted or not is_hidden(path.relative_to(base).as_posix()):
                yield path


def _dataset_units(source: Input) -> list[Unit]:
    shards = dataset_of(source).num_shards
    name = "/".join(filter(None, (source.dataset, source.config, source.split, source.revision)))
    lang = source.lang or ""
    return [Unit(f"{name}/{i}", source, shard=i, shards=shards, lang=lang) for i in range(shards)]


def dataset_of(source: Input) -> Any:
    """The streaming dataset of an input. Raises UserError if it cannot be loaded."""
    datasets = need("datasets", "data", f"dataset {source.dataset}")
    try:
        return datasets.load_dataset(
            source.dataset, source.config, split=source.split, revision=source.revision, streaming=True
        )
    except (OSError, ValueError, ConnectionError) as error:
        raise UserError(f"dataset {source.dataset}: {' '.join(str(error).split())[:300]}") from None
