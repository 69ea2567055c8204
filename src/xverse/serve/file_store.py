"""The files of ``/v1/files``: each is its contents and, written last, a description, in one folder."""

from __future__ import annotations

import json
import re
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from xverse.config import UserError
from xverse.files import atomic_file, write_json
from xverse.log import notice

MOST_FILES, MOST_BYTES, MOST_TOTAL = 1000, 100_000_000, 4_000_000_000
_ID = re.compile(r"file-[0-9a-f]{24}")


@dataclass(frozen=True)
class StoredFile:
    """``owner``: the fingerprint of the API key that may use it."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    owner: str | None
    expires_at: int | None = None

    def described(self) -> dict[str, Any]:
        """OpenAI's object."""
        values = {"object": "file", **asdict(self), "status": "processed", "status_details": None}
        del values["owner"]
        return values


class FileStore:
    """Files in ``folder``, of which this process is the only writer; within bounds of number and size."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, StoredFile] = {}  # files are added in other threads: iterate over copies
        for path in folder.glob("file-*.json"):
            try:
                file = StoredFile(**json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError, OSError):
                notice(f"serve: {path} is not the description of a file; ignored")
                continue
            self._files[file.id] = file
        for path in folder.iterdir():  # what a crash left
            if path.suffix == ".tmp" or (path.suffix == ".data" and path.stem not in self._files):
                path.unlink()

    def path(self, file: StoredFile) -> Path:
        """Of its contents."""
        return self._folder / f"{file.id}.data"

    def check_room(self, size: int) -> None:
        """Raises UserError if a file of this size would exceed a bound."""
        self._expire()
        if size > MOST_BYTES:
            raise UserError(f"file: {size} bytes are too many; the limit is {MOST_BYTES}")
        if len(self._files) >= MOST_FILES:
            raise UserError(f"file: {MOST_FILES} files are stored, the most at once; delete some first")
        total = sum(file.bytes for file in [*self._files.values()])
        if total + size > MOST_TOTAL:
            raise UserError(f"file: {total} of {MOST_TOTAL} bytes are in use; delete some files first")

    def add(
        self,
        contents: BinaryIO | Callable[[BinaryIO], None],
        filename: str,
        purpose: str,
        owner: str | None,
        *,
        expires_at: int | None = None,
        name: str | None = None,
    ) -> StoredFile:
        """Store ``contents``, which are read or write themselves. ``name``: an id, under which the same
        contents may be stored again after a crash."""
        name = name or f"file-{uuid.uuid4().hex[:24]}"
        path = self._folder / f"{name}.data"
        with atomic_file(path) as temporary, temporary.open("wb") as to:
            if callable(contents):
                contents(to)
            else:
                shutil.copyfileobj(contents, to)
        size, now = path.stat().st_size, int(time.time())
        file = StoredFile(name, size, now, filename, purpose, owner, expires_at)
        write_json(self._folder / f"{name}.json", asdict(file))
        self._files[name] = file
        return file

    def get(self, name: str, owner: str | None) -> StoredFile | None:
        self._expire()
        found = self._files.get(name) if _ID.fullmatch(name) else None
        return found if found is not None and found.owner == owner else None

    def owned(self, owner: str | None) -> list[StoredFile]:
        """The owner's files, newest first."""
        self._expire()
        mine = [file for file in [*self._files.values()] if file.owner == owner]
        return sorted(mine, key=lambda file: (-file.created_at, file.id))

    def delete(self, file: StoredFile) -> None:
        self._files.pop(file.id, None)
        (self._folder / f"{file.id}.json").unlink(missing_ok=True)
        self.path(file).unlink(missing_ok=True)

    def _expire(self) -> None:
        now = time.time()
        for file in [*self._files.values()]:
            if file.expires_at and file.expires_at <= now:
                self.delete(file)
