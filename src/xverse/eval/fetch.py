"""Download the benchmarks' data from their publishers and verify it.

A set is accepted only if the digest over all its files is that of the copy used for this project's results.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from xverse.config import UserError, choose
from xverse.data.benchmarks import agieval, gaokao_bench
from xverse.data.benchmarks.mmlu import SUBJECTS
from xverse.files import atomic_directory
from xverse.hub.web import HUGGING_FACE, download, members
from xverse.log import notice

_DATASETS = f"{HUGGING_FACE}/datasets"
_GITHUB = "https://raw.githubusercontent.com"


@dataclass(frozen=True, kw_only=True)
class Home:
    """``url`` is an archive, or has a {name} for each of ``names``. Files in the archive's folder ``within``
    go to the folder ``into`` of the set."""

    url: str
    names: tuple[str, ...] = ()
    within: str = ""
    into: str = ""


@dataclass(frozen=True, kw_only=True)
class Set:
    """``digest``: see ``digest_of``."""

    homes: tuple[Home, ...]
    digest: str
    licence: str


SETS = {
    "mmlu": Set(
        homes=(Home(url=f"{_DATASETS}/cais/mmlu/resolve/main/data.tar", within="data", into="data"),),
        digest="d59a00a733445df0080f4bf01e8f679dc6e1821c24048ea7c6f6e205abaa9328",
        licence="MIT",
    ),
    "ceval": Set(
        homes=(
            Home(url=f"{_DATASETS}/ceval/ceval-exam/resolve/main/ceval-exam.zip"),
            Home(url=f"{_GITHUB}/hkust-nlp/ceval/main/{{name}}", names=("subject_mapping.json",)),
        ),
        digest="66ce5466caa7926329c4f7564a12605f92227cbe1920133a94877cbe66fb496a",
        licence="CC BY-NC-SA 4.0",
    ),
    "agieval": Set(
        homes=(
            Home(
                url=f"{_GITHUB}/ruixiangcui/AGIEval/main/data/v1/{{name}}",
                names=tuple(f"{task}.jsonl" for task in agieval.TASKS),
                into="data/v1",
            ),
        ),
        digest="047d558caf99e057236c9faec82ed6fe8b18eff385727df9bd82e3a688b01d3e",
        licence="MIT and those of its sources",
    ),
    "gaokao-bench": Set(
        homes=(
            Home(
                url=f"{_GITHUB}/OpenLMLab/GAOKAO-Bench/main/Data/Objective_Questions/{{name}}",
                names=tuple(f"{name}.json" for name in gaokao_bench.FILES),
                into="Data/Objective_Questions",
            ),
        ),
        digest="4039240dfe4e39ba4b3195b38d77c600647b82693450957290dc0077f43a71a4",
        licence="Apache-2.0",
    ),
}


def wanted(name: str, path: str) -> bool:
    """Whether a file of a set is one that its benchmark reads."""
    parts = PurePosixPath(path).parts
    if name == "mmlu":
        splits = {f"{subject}_{split}.csv" for subject in SUBJECTS for split in ("dev", "val", "test")}
        return len(parts) == 3 and parts[-1] in splits
    if name == "ceval":
        return path == "subject_mapping.json" or (len(parts) == 2 and path.endswith(f"_{parts[0]}.csv"))
    if name == "agieval":
        return path in {f"data/v1/{task}.jsonl" for task in agieval.TASKS}
    return path in {f"Data/Objective_Questions/{file}.json" for file in gaokao_bench.FILES}


def digest_of(folder: Path, name: str) -> str:
    """sha256 over the sorted names, and sha256 digests, of the files of a set that its benchmark reads."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        inner = path.relative_to(folder).as_posix()
        if wanted(name, inner):
            whole.update(f"{inner} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def fetch(names: Sequence[str], folder: Path, sets: dict[str, Set] | None = None) -> Iterator[str]:
    """Download missing sets; yields a line for each. Raises UserError for an unknown set, a URL that cannot
    be fetched, and a wrong digest; nothing half-written is left."""
    sets = sets or SETS
    for name in names:
        choose("set", name, sets)
    for name in names or sets:
        target = folder / name
        if target.is_dir():
            if digest_of(target, name) != sets[name].digest:
                raise UserError(
                    f"{target}: its files do not have the expected digest; remove it to fetch them again"
                )
            yield f"{name}: already downloaded, {target}"
            continue
        notice(f"eval fetch: {name} ({sets[name].licence})")
        with atomic_directory(target) as partial:
            for home in sets[name].homes:
                _get(name, home, partial)
            digest = digest_of(partial, name)
            if digest != sets[name].digest:
                raise UserError(
                    f"{name}: the files from {sets[name].homes[0].url} have digest {digest[:12]}…, expected "
                    f"{sets[name].digest[:12]}…"
                )
        yield f"{name}: {target}"


def _get(name: str, home: Home, target: Path) -> None:
    if home.names:
        for file in home.names:
            _put(target, str(PurePosixPath(home.into) / file), download(home.url.format(name=file)))
        return
    data = download(home.url)
    for inner, content in members(data, home.url):
        path = PurePosixPath(inner)
        if home.within:
            if path.parts[:1] != (home.within,):
                continue
            path = PurePosixPath(*path.parts[1:])
        path = PurePosixPath(home.into) / path
        if wanted(name, path.as_posix()):
            _put(target, path.as_posix(), content)


def _put(target: Path, inner: str, content: bytes) -> None:
    parts = PurePosixPath(inner)
    if parts.is_absolute() or ".." in parts.parts:
        raise UserError(f"the archive holds '{inner}', which is outside its folder")
    path = target / parts
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
