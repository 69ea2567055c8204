"""Writing that never leaves half a file: everything lands by one rename."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from xverse.config import UserError


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it becomes ``path`` when the block ends without an error."""
    path = Path(path)
    with _write_errors(path):
        _make_parent(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory beside ``path``; it takes the place of ``path`` when the block ends.

    A crash leaves the old directory or the new one, never a mixture. Replacing an existing directory is
    two renames, because POSIX has no portable exchange: between them the old one stands as ``.NAME.old``.
    """
    path = Path(path)
    with _write_errors(path):
        _make_parent(path)
        recover_directory(path)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        temporary.chmod(0o755)
        try:
            yield temporary
            for item in temporary.rglob("*"):
                _sync(item)
            _sync(temporary)
            if path.exists():
                old = path.with_name(f".{path.name}.old")
                path.replace(old)
                temporary.replace(path)
                shutil.rmtree(old)
            else:
                temporary.replace(path)
            _sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def recover_directory(path: str | Path) -> None:
    """Finish what a crash inside ``atomic_directory`` left: put the old directory back, or drop it."""
    path = Path(path)
    old = path.with_name(f".{path.name}.old")
    if old.exists():
        if path.exists():
            shutil.rmtree(old)
        else:
            old.replace(path)


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # of any kind: some file systems say "no such file" for "not allowed"
        raise UserError(f"{path}: cannot be written ({os.strerror(error.errno or 0)})") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = "the disk is full" if error.errno == errno.ENOSPC else os.strerror(error.errno)
            raise UserError(f"{path}: {reason}; nothing was written") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{path}: cannot be written ({os.strerror(error.errno)})") from error
        raise
