"""Files at URLs, such as ``s3://bucket/folder/*.jsonl``, through fsspec: listed, read, written, with retries.

Credentials and endpoints are those of fsspec and the services' own tools, for example AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL, ``FSSPEC_OSS_ENDPOINT`` or ~/.config/fsspec. ``config.refuse_url`` refuses a URL where
only a local path works.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from xverse.config import UserError, need

ATTEMPTS = 5  # to read on after an error of the network
PAUSE = 1.0  # seconds before the second attempt; doubled before each further one
BLOCK = 8 << 20  # bytes read ahead
KNOWN = ("s3", "oss", "gs", "hdfs", "http", "https", "hf", "file")
_CLIENTS = {"s3": "s3fs", "s3a": "s3fs", "oss": "ossfs", "gs": "gcsfs", "gcs": "gcsfs", "hdfs": "pyarrow"}
_CLIENTS |= {"http": "aiohttp", "https": "aiohttp"}  # packages that fsspec does not bring along
STORES = ("s3", "s3a", "oss", "gs", "gcs", "hf", "memory")  # a file appears when it is complete; no folders


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. Raises UserError for an unknown protocol."""
    import fsspec

    scheme, _, place = url.partition("://")
    protocol = scheme.lower()
    if protocol not in fsspec.available_protocols():
        raise UserError(f"{url}: unknown protocol '{protocol}'; known are {', '.join(KNOWN)}")
    if protocol in _CLIENTS:
        need(_CLIENTS[protocol], "data" if protocol == "hdfs" else "remote", f"{protocol}://", load=False)
    try:
        with _errors(url):
            found: tuple[Any, str] = fsspec.core.url_to_fs(f"{protocol}://{place}")
            return found
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {' '.join(str(error).split())[:300]}") from None


def find(url: str) -> list[tuple[str, int]]:
    """The files of a URL with their sizes (0 if unknown), by name: a file, all in a folder, or a pattern's.

    Raises UserError where they cannot be listed; an empty list if there are none.
    """
    return [(name, int(info.get("size") or 0)) for name, info in sorted(_listed(url.rstrip("/")).items())]


def listing(folder: str) -> dict[str, list[str]]:
    """The files below a folder by relative name, each with what identifies its contents: its size, and its
    ETag or time of change if there is one. Raises UserError where they cannot be listed."""
    folder = folder.rstrip("/")
    found = _listed(folder).items()
    return {name.removeprefix(f"{folder}/"): _marks(info) for name, info in sorted(found) if name != folder}


def version(url: str) -> list[str] | None:
    """What ``listing`` has for one file; None if there is no such file."""
    fs, path = filesystem(url)
    with _errors(url):
        try:
            return _marks(_retried(lambda: _info(fs, path)))
        except FileNotFoundError:
            return None


def is_web(url: str) -> bool:
    """Whether a URL is of a web server, which can be read but neither listed nor written."""
    return url.lower().startswith(("http://", "https://"))


def _info(fs: Any, path: str) -> Any:
    """fsspec's description of a file, whose file system of the web reports any failure as a missing file."""
    try:
        return fs.info(path)
    except FileNotFoundError as error:
        cause, status = error.__cause__, getattr(error.__cause__, "status", 0)
        if cause is None or status in (404, 410):
            raise
        raise (PermissionError if status in (401, 403) else ConnectionError)(str(cause)) from None


def _listed(url: str) -> dict[str, dict[str, Any]]:
    """The files of a file's, a folder's or a pattern's URL, with fsspec's description of each."""
    fs, path = filesystem(url)
    with _errors(url):
        if is_web(url):  # ? begins a query
            return {url: _retried(lambda: _info(fs, path))}
        fs.invalidate_cache()  # other processes write there as well
        pattern = set(path) & set("*?[")
        found = _retried(lambda: (fs.glob if pattern else fs.find)(path, detail=True))
    # fsspec's paths lack the protocol, and the host of some.
    base = url.removesuffix(path) if url.endswith(path) else f"{url.partition('://')[0]}://"
    return {f"{base}{name}": info for name, info in found.items() if info["type"] == "file"}


def _marks(info: dict[str, Any]) -> list[str]:
    marks = (info.get(key) for key in ("size", "ETag", "etag", "mtime", "LastModified", "created"))
    return [str(mark) for mark in marks if mark is not None]


def upload(path: Path, url: str) -> None:
    """Write a file to a URL, where it appears when it is complete. Raises UserError if it cannot be written,
    after ATTEMPTS attempts."""
    fs, target = filesystem(url)
    with _errors(url, "written"):
        if url.partition("://")[0].lower() in STORES:
            _retried(lambda: fs.put_file(str(path), target))
            return
        folder, _, name = target.rpartition("/")
        temporary = f"{folder}/.{name}.tmp"
        fs.makedirs(folder, exist_ok=True)
        _retried(lambda: fs.put_file(str(path), temporary))
        fs.mv(temporary, target)


def remove(url: str) -> None:
    """Delete a file, or a folder with everything below it, if there is one."""
    fs, path = filesystem(url)
    with _errors(url, "deleted"), contextlib.suppress(FileNotFoundError):
        _retried(lambda: fs.rm(path, recursive=True))


def open_url(url: str) -> BinaryIO:
    """Open a file for reading; after an error of the network it is opened again at the same place.

    Raises UserError for a file that is missing or not to be read.
    """
    return cast(BinaryIO, io.BufferedReader(_Reader(url), 1 << 16))


class _Reader(io.RawIOBase):
    def __init__(self, url: str) -> None:
        self.url, self.place = url, 0
        self.fs, self.path = filesystem(url)
        self.file: Any = None
        with _errors(url):
            self.size = _retried(lambda: self.fs.info(self.path)).get("size")
            _retried(self._open)

    def _open(self) -> None:
        if self.file is not None:
            with contextlib.suppress(Exception):
                self.file.close()
        self.file = self.fs.open(self.path, "rb", block_size=BLOCK)
        if self.place and self.file.seekable():
            self.file.seek(self.place)
        elif self.place:
            left = self.place
            while left and (data := self.file.read(min(left, BLOCK))):
                left -= len(data)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self.size is not None and self.file.seekable())

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if not self.seekable():
            raise io.UnsupportedOperation("seek")
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        self.place = int(base + offset)
        self.file.seek(self.place)
        return self.place

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        def read() -> bytes:
            data: bytes = self.file.read(len(buffer))
            if not data and self.size is not None and self.place < self.size:
                raise ConnectionError(f"ended after {self.place:,} of {self.size:,} bytes")
            return data

        with _errors(self.url):
            data = _retried(read, self._open)
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        super().close()


def _retried(call: Callable[[], Any], again: Callable[[], None] | None = None) -> Any:
    """The result of ``call``, tried ATTEMPTS times; ``again`` is called before each further attempt."""
    attempt = 0
    while True:
        try:
            if attempt and again is not None:
                again()
            return call()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError):
            raise
        except Exception:  # the services' libraries have no base class in common
            attempt += 1
            if attempt == ATTEMPTS:
                raise
            time.sleep(PAUSE * 2 ** (attempt - 1))


@contextlib.contextmanager
def _errors(url: str, done: str = "read") -> Iterator[None]:
    """UserError for whatever the libraries of the services raise, which have no exception in common."""
    try:
        yield
    except (UserError, ImportError):
        raise
    except FileNotFoundError:
        raise UserError(f"{url}: no such file") from None
    except PermissionError as error:
        raise UserError(f"{url}: cannot be {done} (no permission: {str(error)[:200]})") from None
    except Exception as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{url}: cannot be {done} ({why})") from None
