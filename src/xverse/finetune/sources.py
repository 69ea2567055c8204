"""From the names in ``--dataset`` to items: dataset_info.json, files, folders and repositories of hubs."""

from __future__ import annotations

import importlib.resources
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xverse.config import UserError, build, nearest, need
from xverse.data.dialogues.conversations import DatasetInfo, check_columns, guess
from xverse.data.dialogues.instructions import read_items
from xverse.hub.datasets import fetch_dataset
from xverse.log import notice

JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
SUFFIXES = (*JSON_SUFFIXES, ".txt", ".csv", ".parquet")
INFO = "dataset_info.json"


@dataclass(frozen=True)
class Source:
    """A dataset and where it lies: files here, or a repository to fetch them from."""

    name: str
    info: DatasetInfo
    path: Path | None
    guessed: bool = False  # its format shows in the keys of its items


def packaged() -> dict[str, Any]:
    """The entries that are known everywhere, with their homes on hubs."""
    text = (importlib.resources.files("xverse.finetune") / INFO).read_text(encoding="utf-8")
    return json.loads(text)


def find_sources(names: str, folder: Path) -> list[Source]:
    """What ``names`` (parted by commas) mean: entries of ``folder/dataset_info.json`` or of the packaged one,
    paths in ``folder`` or from here, or ids of dataset repositories.

    Raises UserError, listing what there is, for a name that is none of these.
    """
    file = folder / INFO
    known: dict[str, Any] = packaged()
    own: dict[str, Any] = {}
    if file.is_file():
        try:
            own = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: ill-formed JSON ({error})") from None
        if not isinstance(own, dict):
            raise UserError(f"{file}: expected a mapping of names to datasets")
    found = []
    for name in (part.strip() for part in names.split(",")):
        if name in own:
            found.append(_entry(name, own[name], file))
        elif any((path := place).exists() for place in (folder / name, Path(name).expanduser()) if name):
            found.append(Source(name, DatasetInfo(), path, guessed=True))
        elif name in known:
            found.append(_entry(name, known[name], Path(INFO)))
        elif name.count("/") == 1 and not Path(name).suffix:
            found.append(Source(name, DatasetInfo(hf_hub_url=name), None, guessed=True))
        else:
            here = [*own, *(item.name for item in folder.glob("*") if item.name.endswith(SUFFIXES))]
            listing = ", ".join(sorted(here)) or "nothing"
            raise UserError(
                f"no dataset '{name}'{nearest(name, [*here, *known])} ({folder} has {listing}; "
                f"with a home on a hub: {', '.join(known)})"
            )
    return found


def _entry(name: str, values: Any, file: Path) -> Source:
    info = build(DatasetInfo, values, f"{file}: {name}")
    if info.hf_hub_url or info.ms_hub_url:
        return Source(name, info, None)
    if info.file_name is None:
        raise UserError(f"{file}: {name}: has neither file_name nor hf_hub_url; others are not supported")
    path = file.parent / info.file_name
    if not path.exists():
        raise UserError(f"{file}: {name}: no such file or folder: {path}")
    return Source(name, info, path)


def read_source(source: Source, stage: str, skipped: Counter[str]) -> Iterator[tuple[Any, DatasetInfo]]:
    """The items of a dataset with their description. Lines that are no JSON are counted in ``skipped``.

    Raises UserError for files that cannot be read, or whose columns do not fit.
    """
    info = source.info
    path = source.path or fetch(source)
    files = [path]
    if path.is_dir():
        files = sorted(item for item in path.rglob("*") if item.is_file() and item.name.endswith(SUFFIXES))
        files = [item for item in files if item.name not in (INFO, "dataset_infos.json")]
        if source.path is None:
            files = _of_split(files, path, info, source.name)
        if not files:
            raise UserError(f"{path}: no dataset here; known are {', '.join(SUFFIXES)}")
    limit = info.num_samples
    count = 0
    for file in files:
        first = True
        for item in _read_file(file, skipped):
            if limit is not None and count >= limit:
                return
            if first and source.guessed:
                info = guess(item, str(file))
            if first:
                check_columns(item, info, stage, f"{source.name} ({file.name})")
                first = False
            count += 1
            yield item, info


def _read_file(file: Path, skipped: Counter[str]) -> Iterator[Any]:
    if file.name.endswith(JSON_SUFFIXES):
        yield from read_items(file, skipped)
    elif file.suffix == ".txt":
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read ({error})") from None
        for line in lines:
            if line.strip():
                yield {"text": line}
    else:
        pandas = need("pandas", "finetune", str(file))
        try:
            table = pandas.read_csv(file) if file.suffix == ".csv" else pandas.read_parquet(file)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())})") from None
        yield from json.loads(table.to_json(orient="records"))


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
