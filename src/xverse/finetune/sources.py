"""From the names in ``dataset`` to items: dataset_info.json, files, folders and repositories of hubs."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xverse.config import UserError, build, nearest, need
from xverse.data.dialogues.formats import DatasetInfo, check_columns, guess
from xverse.finetune.settings import DatasetUse
from xverse.hub.datasets import fetch_dataset
from xverse.log import notice
from xverse.records import read_parquet, read_records, read_table
from xverse.texts import COMPRESSED, ReadReport, encodable, files_below, kind_of, read_json, read_text_lines

KINDS = (".json", ".jsonl", ".txt", ".csv", ".tsv", ".parquet")
SUFFIXES = (*KINDS, *(f"{kind}{packed}" for kind in KINDS[:-1] for packed in COMPRESSED))
INFO = "dataset_info.json"


@dataclass(frozen=True)
class Source:
    """A dataset, how the run uses it and where it is: local files, or a repository to fetch them from."""

    use: DatasetUse
    info: DatasetInfo
    path: Path | None
    guessed: bool = False  # no entry describes it; the keys of its items show the format

    @property
    def name(self) -> str:
        return self.use.name


@dataclass(frozen=True)
class SourceFile:
    """One file of a dataset. ``name`` is the file's in a local folder and the dataset's otherwise."""

    source: Source
    path: Path
    name: str
    in_folder: bool


def packaged() -> dict[str, Any]:
    """The entries known without a dataset_info.json, with their repositories on hubs."""
    text = (importlib.resources.files("xverse.finetune") / INFO).read_text(encoding="utf-8")
    return json.loads(text)


def find_sources(uses: Sequence[DatasetUse], folder: Path) -> list[Source]:
    """What the names mean: entries of ``folder/dataset_info.json`` or of the packaged one, paths in
    ``folder`` or the working directory, or ids of dataset repositories.

    Raises UserError, listing the known datasets, for any other name.
    """
    file = folder / INFO
    known: dict[str, Any] = packaged()
    own: dict[str, Any] = {}
    if file.is_file():
        own = read_json(file)
        if not isinstance(own, dict):
            raise UserError(f"{file}: expected a mapping of names to datasets")
    sources = []
    for use in uses:
        name = use.name
        if name in own:
            sources.append(_entry(use, own[name], file))
        elif any((path := place).exists() for place in (folder / name, Path(name).expanduser()) if name):
            sources.append(Source(use, DatasetInfo(), path, guessed=True))
        elif name in known:
            sources.append(_entry(use, known[name], Path(INFO)))
        elif name.count("/") == 1 and not Path(name).suffix:
            sources.append(Source(use, DatasetInfo(hf_hub_url=name), None, guessed=True))
        else:
            here = [*own, *(item.name for item in folder.glob("*") if item.name.lower().endswith(SUFFIXES))]
            listing = ", ".join(sorted(here)) or "nothing"
            raise UserError(
                f"no dataset '{name}'{nearest(name, [*here, *known])} ({folder} has {listing}; "
                f"known on hubs: {', '.join(known)})"
            )
    return sources


def _entry(use: DatasetUse, values: Any, file: Path) -> Source:
    where = f"{file}: {use.name}"
    info = build(DatasetInfo, values, where)
    if info.on_hub:
        return Source(use, info, None)
    if info.file_name is None:
        raise UserError(f"{where}: needs file_name, hf_hub_url or ms_hub_url")
    path = file.parent / info.file_name
    if not path.exists():
        raise UserError(f"{where}: no such file or folder: {path}")
    if info.file_sha1:
        _check_sha1(path, info.file_sha1, where)
    return Source(use, info, path)


def _check_sha1(path: Path, expected: str, where: str) -> None:
    if path.is_dir():
        raise UserError(f"{where}: file_sha1 needs a file, and {path} is a folder")
    with path.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha1").hexdigest()
    if actual != expected.lower():
        raise UserError(
            f"{where}: {path} has SHA-1 {actual}, not {expected}; restore the file or update file_sha1"
        )


def source_files(source: Source) -> list[SourceFile]:
    """The files of a dataset, fetched if need be, in name order. Raises UserError if there are none."""
    info = source.info
    path = source.path or fetch(source)
    if not path.is_dir():
        return [SourceFile(source, path, source.name, in_folder=False)]
    files = [item for item in files_below(path) if item.name.lower().endswith(SUFFIXES)]
    files = [item for item in files if item.name not in (INFO, "dataset_infos.json")]
    if source.path is None:
        files = _of_split(files, path, info, source.name)
    if not files:
        raise UserError(f"{path}: no dataset here; known formats are {', '.join(KINDS)}")
    local = source.path is not None
    return [SourceFile(source, item, item.name if local else source.name, in_folder=local) for item in files]


def read_file(file: SourceFile, stage: str, skipped: Counter[str]) -> Iterator[tuple[Any, DatasetInfo]]:
    """The items of one file with their description. Ill-formed lines are counted in ``skipped``.

    Raises UserError for a file that cannot be read, or whose columns do not fit.
    """
    source, info = file.source, file.source.info
    for number, item in enumerate(_items(file.path, skipped)):
        if number == 0:
            if source.guessed:
                info = guess(item, str(file.path))
            where = source.name
            if file.path.name != where:
                where += f" ({file.path.name})"
            check_columns(item, info, stage, where)
        yield item, info


def _items(file: Path, skipped: Counter[str]) -> Iterator[Any]:
    kind = kind_of(file)
    if kind in (".json", ".jsonl"):
        yield from _records(file, read_records, "ill-formed lines", skipped)
    elif kind == ".txt":
        for line in read_text_lines(file):
            if line.strip():
                yield {"text": line}
    elif kind in (".csv", ".tsv"):
        yield from _records(file, read_table, "ill-formed rows", skipped)
    elif kind != ".parquet":
        raise UserError(f"{file}: unknown format; known are {', '.join(KINDS)}, by the end of the name")
    else:
        need("pyarrow", "finetune", str(file), load=False)
        yield from (row for _, row in read_parquet(file))


def _records(
    file: Path,
    read: Callable[[Path, ReadReport], Iterator[tuple[int, Any]]],
    ill_formed: str,
    skipped: Counter[str],
) -> Iterator[Any]:
    report = ReadReport()
    for _, item in read(file, report):
        if encodable(json.dumps(item, ensure_ascii=False)):
            yield item
        else:
            skipped["invalid UTF-8"] += 1
    if report.broken_files:
        raise UserError(f"{file}: {report.broken_files[0]}")
    if report.skipped:
        skipped[ill_formed] += report.skipped


def fetch(source: Source) -> Path:
    """Download a dataset's repository into the hub's cache, or find it there. Raises UserError otherwise."""
    info = source.info
    patterns = [f"{info.folder}/*" if info.folder else f"*{suffix}" for suffix in SUFFIXES]
    try:
        return fetch_dataset(info.hf_hub_url, info.ms_hub_url, patterns)
    except UserError as error:
        raise UserError(
            f"dataset {source.name} cannot be fetched: {error}; --dataset PATH uses a local copy"
        ) from None


def _of_split(files: list[Path], root: Path, info: DatasetInfo, name: str) -> list[Path]:
    """Of a repository's files those of the subset and split, by their names; all where names say none."""
    chosen = [file for file in files if not info.subset or info.subset in file.relative_to(root).as_posix()]
    named = [file for file in chosen if info.split in file.name]
    if len(chosen) > 1 and not named:
        notice(f"{name}: no file is named after the split '{info.split}'; all {len(chosen)} are read")
    return named or chosen
