"""Folders that may be at a URL: inputs are copied to the cache once, outputs are sent when they are complete.

A folder at a URL is complete when it has a list of its files with their sizes and SHA-256, which is sent
last: ``state.json`` of a checkpoint, otherwise ``fingerprints.json``. Copies are compared with it. Folders
that other programs uploaded have no such list and are read without it. The cache is $XVERSE_CACHE or
~/.cache/xverse.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xverse.config import UserError, is_url
from xverse.files import alone, atomic_file, fingerprint, write_json
from xverse.log import notice
from xverse.remote import filesystem, is_web, listing, open_url, remove, upload, version
from xverse.texts import read_json

STATE = "state.json"  # of a checkpoint of pretraining
MARKS = "fingerprints.json"  # of any other folder
LISTS = (STATE, MARKS)
LATE = ("config.json", "report.json", "trainer_state.json")  # sent after the files that they describe
RECORD = "xverse_source.json"  # in a copy: what it was made from
UNSENT = (".tmp", ".lock", RECORD)


@dataclass(frozen=True)
class Place:
    """Where something is written: ``local``, from which ``send`` copies it to ``url`` if there is one."""

    local: Path
    url: str = ""

    @staticmethod
    def of(value: str | Path) -> Place:
        """A path, or a URL and a path in the cache. Raises UserError for a URL that cannot be written."""
        if not is_url(value):
            return Place(Path(value).expanduser())
        url = str(value).rstrip("/")
        if is_web(url):
            raise UserError(f"{url}: a web server can only be read; write to a path or a store")
        filesystem(url)  # before any work: an unknown protocol, a missing package
        return Place(_cached("places", url), url)

    def __str__(self) -> str:
        return self.url or str(self.local)

    def __truediv__(self, name: str) -> Place:
        return Place(self.local / name, self.url and f"{self.url}/{name}")

    def send(self, skip: str = "\0") -> None:
        """Upload the file or the folder, except names that begin with ``skip``. A folder is incomplete there
        until all have arrived; what it has besides is deleted. Raises UserError where the store fails."""
        if self.url and self.local.is_file():
            upload(self.local, self.url)
        if not self.url or self.local.is_file():
            return
        files = (file for file in self.local.rglob("*") if file.is_file() and not file.name.endswith(UNSENT))
        names = {name for file in files if not (name := str(file.relative_to(self.local))).startswith(skip)}
        own = next((name for name in LISTS if name in names), None)
        for name in (*LISTS, *LATE):  # nobody takes old and new files for one folder
            remove(f"{self.url}/{name}")
        for name in listing(self.url):
            if name not in names and not name.startswith(skip):
                remove(f"{self.url}/{name}")
        for name in sorted(names, key=lambda name: (name == own, name in LATE, name)):
            upload(self.local / name, f"{self.url}/{name}")
        if own is None:
            marks = {name: fingerprint(self.local / name) for name in sorted(names)}
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / MARKS
                file.write_text(json.dumps({"files": marks}), encoding="utf-8")
                upload(file, f"{self.url}/{MARKS}")


@contextlib.contextmanager
def output(value: str, overwrite: bool) -> Iterator[str]:
    """The path to write for ``--out``, which is sent afterwards if it is a URL. Raises UserError, before the
    block, where the URL holds files and ``overwrite`` is false."""
    if not is_url(value):
        yield value
        return
    place = Place.of(value)
    if not overwrite and (listing(place.url) or version(place.url)):
        raise UserError(f"{place}: already holds files; --overwrite replaces them")
    shutil.rmtree(place.local, ignore_errors=True)
    made = Place(place.local / place.url.rpartition("/")[2], place.url)
    yield str(made.local)
    try:
        made.send()
    except UserError as error:
        raise UserError(f"{error}; what was to be sent is complete in {made.local}") from None
    shutil.rmtree(place.local)
    notice(f"sent to {place}")


def fetch(
    url: str,
    choose: Callable[[Collection[str]], Iterable[str]],
    kind: str,
    there: Mapping[str, list[str]] | None = None,
) -> Path:
    """The copy of a folder at a URL, of whose files ``choose`` selects those to copy by relative name.
    ``there``: its files, with what identifies their contents, on a web server that has no list of them.

    A file is copied again if it has another size or version there. Raises UserError if the folder cannot be
    listed or read, if a file differs from the folder's list, or if the disk is full.
    """
    url = url.rstrip("/")
    marks = read_list(url)
    if there is None and is_web(url):
        there = {name: list(map(str, mark)) for name, mark in marks.items()}
        there |= {name: mark for name in LISTS if (mark := version(f"{url}/{name}")) is not None}
    there = listing(url) if there is None else there
    if lost := marks.keys() - there.keys():
        raise UserError(f"{url}/{min(lost)}: no such file; upload the folder again")
    source = {name: there[name] for name in choose(there)}
    if odd := [name for name in source if name.startswith("/") or ".." in name.split("/")]:
        raise UserError(f"{url}: has a file named '{odd[0]}', outside of the folder")
    folder = _cached(kind, url)
    with _waiting(folder.with_name(f".{folder.name}.lock")):
        made: dict[str, Any] = read_json(folder / RECORD) if (folder / RECORD).exists() else {}
        missing = [n for n, mark in source.items() if made.get(n) != mark or not (folder / n).is_file()]
        if missing:
            notice(f"{url}: copied to {folder}")
        for name in missing:
            copy(f"{url}/{name}", folder / name, marks.get(name))
            made[name] = source[name]
            write_json(folder / RECORD, made)
        for name in made.keys() - source.keys():
            (folder / name).unlink(missing_ok=True)
        if made.keys() != source.keys():
            write_json(folder / RECORD, source)
    return folder


def read_list(url: str) -> dict[str, Any]:
    """The sizes and SHA-256 of a complete folder's files by relative name; empty if it has no list."""
    for name in LISTS:
        if version(f"{url}/{name}") is not None:
            with open_url(f"{url}/{name}") as file:
                try:
                    return dict(json.load(file)["files"])
                except (ValueError, KeyError, TypeError):
                    raise UserError(f"{url}/{name}: not a list of files; upload the folder again") from None
    return {}


def copy(url: str, target: Path, mark: list[Any] | None = None) -> None:
    """Copy a file, and once more if it differs from its fingerprint. Raises UserError if it still differs."""
    with atomic_file(target) as temporary:
        for _ in range(2):
            with open_url(url) as stream, temporary.open("wb") as file:
                shutil.copyfileobj(stream, file, 8 << 20)
            if mark is None or fingerprint(temporary) == list(mark):
                return
        raise UserError(f"{url}: has another size or SHA-256 than was recorded; upload it again")


def _cached(kind: str, url: str) -> Path:
    cache = Path(os.environ.get("XVERSE_CACHE") or "~/.cache/xverse").expanduser()
    return cache / kind / f"{url.rpartition('/')[2]}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"


@contextlib.contextmanager
def _waiting(lock: Path) -> Iterator[None]:
    """Wait for another process that makes the same copy, such as another rank of a run."""
    busy = f"{lock}: another process is copying this"
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(alone(lock, busy))
                break
            except UserError as error:
                if not str(error).startswith(busy):
                    raise
                time.sleep(0.5)
        yield
