"""Writing that never leaves half a file, as everything lands by one rename; and folders of one process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

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


@contextlib.contextmanager
def alone(lock: str | Path, busy: str) -> Iterator[None]:
    """Hold the file ``lock`` as long as the block runs, on machines that share it; nothing of it stays.

    However the process ends the lock is let go of. Raises UserError(``busy``) where another process has it.
    """
    lock = Path(lock)
    made = not lock.parent.exists()
    with _write_errors(lock.parent):
        _make_folder(lock.parent, lock.parent)
        file = _held(lock, busy)
    with file:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            if made:
                with contextlib.suppress(OSError):  # the block put something there
                    lock.parent.rmdir()


def _held(lock: Path, busy: str) -> IO[str]:
    while True:
        file = lock.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(busy) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a file system without locks
                file.close()
                raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return file
        file.close()  # whoever held it has just removed it


def _make_parent(path: Path) -> None:
    _make_folder(path.parent, path)


def _make_folder(folder: Path, shown: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # of any kind: some file systems say "no such file" for "not allowed"
        raise UserError(f"{shown}: cannot be written ({os.strerror(error.errno or 0)})") from error


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
