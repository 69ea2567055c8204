"""Atomic writing of files and directories, by one rename, and locks between processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from xverse.config import UserError, refuse_url

SEAL = "sha256"  # of the other values of a JSON file


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a new, empty file next to ``path``; it is renamed to ``path`` if the block does not raise."""
    path = Path(path)
    with _write_errors(path):
        make_folder(path.parent, path)
        if path.exists() and not path.is_file():  # a rename would replace a device
            raise UserError(f"{path}: is not a file; give another name")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.touch()
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a file in UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory next to ``path``; it replaces ``path`` if the block does not raise.

    A crash leaves the old directory or the new one, never a mixture. Replacing an existing directory takes
    two renames, because POSIX has no portable exchange; between them the old one is called ``.NAME.old``.
    """
    path = Path(path)
    with _write_errors(path):
        make_folder(path.parent, path)
        recover_directory(path)
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is not a folder; give another name")
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        temporary.chmod(0o755)
        try:
            yield temporary
            for item in temporary.rglob("*"):
                sync(item)
            sync(temporary)
            if path.exists():
                old = path.with_name(f".{path.name}.old")
                path.replace(old)
                temporary.replace(path)
                shutil.rmtree(old)
            else:
                temporary.replace(path)
            sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def recover_directory(path: str | Path) -> None:
    """Clean up after a crash inside ``atomic_directory``: restore the old directory, or delete it."""
    path = Path(path)
    old = path.with_name(f".{path.name}.old")
    if old.exists():
        if path.exists():
            shutil.rmtree(old)
        else:
            old.replace(path)


@contextlib.contextmanager
def alone(lock: str | Path, busy: str) -> Iterator[None]:
    """Hold the lock file ``lock`` while the block runs, also across machines that share a file system.

    The lock is released however the process ends, and the file is removed. Raises UserError if another
    process holds it: ``busy`` with that process's id and host, which the file holds.
    """
    lock = Path(lock)
    made = not lock.parent.exists()
    with _write_errors(lock.parent):
        make_folder(lock.parent)
        file = _held(lock, busy)
    with file:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            if made:
                with contextlib.suppress(OSError):  # the block created files there
                    lock.parent.rmdir()


def _held(lock: Path, busy: str) -> IO[str]:
    while True:
        with _write_errors(lock):
            file = lock.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(f"{busy}{_holder(lock)}") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # file systems without locks
                file.close()
                raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {socket.gethostname()}")
                    file.flush()
                return file
        file.close()  # the previous holder has just removed it


def _holder(lock: Path) -> str:
    """`` (process 123 on host)``, or an empty string if the holder could not write its name."""
    with contextlib.suppress(OSError):
        name = lock.read_text(encoding="utf-8", errors="replace").strip()
        return f" ({name})" if name else ""
    return ""


def fingerprint(path: Path) -> list[Any]:
    """Size in bytes and SHA-256 of a file, as JSON stores them."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def check_fingerprint(path: Path, expected: Sequence[Any]) -> None:
    """Raises ValueError if a file differs from its recorded ``fingerprint``, OSError if it is unreadable."""
    size, digest = expected
    if path.stat().st_size != size:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {size}")
    if fingerprint(path)[1] != digest:
        raise ValueError(f"{path.name} has another SHA-256 than was recorded")


def sealed(values: dict[str, Any]) -> str:
    """``values`` as JSON, with the SHA-256 that ``read_sealed`` compares."""
    return json.dumps({**values, SEAL: hashlib.sha256(json.dumps(values).encode()).hexdigest()})


def read_sealed(path: Path) -> dict[str, Any]:
    """The object of a JSON file. Raises ValueError if it is none or has changed since ``sealed`` (files of
    earlier versions have no digest), OSError if it is unreadable."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} holds no object")
    seal = values.pop(SEAL, None)
    if seal is not None and seal != hashlib.sha256(json.dumps(values).encode()).hexdigest():
        raise ValueError(f"{path.name} has another SHA-256 than was recorded")
    return values


def make_folder(folder: Path, shown: Path | None = None) -> None:
    """Create a folder and those above it. Raises UserError, naming ``shown``, if that is not possible."""
    shown = shown or folder
    refuse_url(shown, "output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # which names a folder above the parent
        raise UserError(f"{shown}: cannot be written ({os.strerror(error.errno or 0)})") from error


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path) -> None:
    """Raise UserError if a folder cannot be created or written, before long work; creates nothing."""
    with _write_errors(folder):  # a name that is too long
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{folder}: cannot be written ({existing} is a file)")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written (no permission in {existing})")


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """UserError for the errors of writing ``path``, which may be any: some file systems report ENOENT for
    EACCES. Those of other files, which the block reads, and of pipes and connections remain."""
    try:
        yield
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else path
        elsewhere = path.absolute().parent not in Path(name).absolute().parents
        if elsewhere or not error.errno or isinstance(error, ConnectionError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = "the disk is full" if error.errno == errno.ENOSPC else os.strerror(error.errno)
            raise UserError(f"{path}: {reason}; nothing was written") from error
        raise UserError(f"{path}: cannot be written ({os.strerror(error.errno)})") from error
