"""Models from Hugging Face: resumed where a download broke off, and checked against the hub's checksums.

The weights are downloaded here rather than by ``snapshot_download``, which since huggingface_hub 2 drops an
unfinished file when its process ends: with shards of gigabytes that is most of the work. They land in the
hub's own cache under the names that it gives them, so every other program finds them there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import HfApi, constants, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
    hf_raise_for_status,
)

from xverse.config import UserError
from xverse.files import atomic_file
from xverse.hub.resolve import choose_files, similar
from xverse.log import notice, progress

ATTEMPTS = 5  # in a row without a byte
CONNECTIONS = 4
MEGABYTE = 10**6


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it; ``sha256`` where it is stored by Git LFS, else the git blob id."""

    name: str
    size: int
    sha256: str | None
    blob_id: str | None

    @property
    def checksum(self) -> str | None:
        return self.sha256 or self.blob_id


def fetch(model: str) -> Path:
    """Download ``org/name`` into the hub's cache, or find it there, and verify it.

    Raises UserError, in one line, for an unknown id, no network, no space and a wrong checksum; a file with a
    wrong checksum is removed, so that the next call fetches it again.
    """
    repository = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=model, repo_type="model")
    try:
        info = HfApi().model_info(model, files_metadata=True)
    except GatedRepoError:
        raise UserError(f"{model}: ask for access on its page, then set HF_TOKEN") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"{constants.ENDPOINT} has no model '{model}'{similar(model)} "
            "(a private one needs HF_TOKEN; a directory must exist)"
        ) from None
    except (OfflineModeIsEnabled, HTTPError, OSError) as error:
        return _from_cache(model, repository, error)
    listed = [
        RemoteFile(item.rfilename, item.size or 0, item.lfs.sha256 if item.lfs else None, item.blob_id)
        for item in info.siblings or []
    ]
    names = set(choose_files(model, [file.name for file in listed]))
    files = [file for file in listed if file.name in names]
    try:
        _download(model, str(info.sha), repository / "blobs", [file for file in files if file.sha256])
        with _quiet():
            snapshot = Path(snapshot_download(model, allow_patterns=sorted(names)))
    except (HTTPError, OSError) as error:
        raise UserError(
            f"{model}: the download stopped ({_text(error)}); the same command resumes it"
        ) from error
    _verify(model, repository, snapshot, {file.name: file.checksum for file in files})
    return snapshot


def _from_cache(model: str, repository: Path, error: Exception) -> Path:
    offline = isinstance(error, OfflineModeIsEnabled)
    why = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} cannot be reached ({_text(error)})"
    try:
        snapshot = Path(snapshot_download(model, allow_patterns=["config.json"], local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        raise UserError(f"{model}: not in the cache, and {why}") from None
    if not offline:
        notice(f"{model}: {why}; using the cached copy")
    _verify(model, repository, snapshot, {})
    return snapshot


def _download(model: str, revision: str, blobs: Path, files: list[RemoteFile]) -> None:
    files = [file for file in files if not (blobs / str(file.sha256)).exists()]
    if not files:
        return
    blobs.mkdir(parents=True, exist_ok=True)
    parts = {file.name: blobs / f"{file.sha256}.part" for file in files}
    done = sum(part.stat().st_size for part in parts.values() if part.exists())
    total = sum(file.size for file in files)
    free = shutil.disk_usage(blobs).free
    if total - done > free:
        raise UserError(
            f"{model}: needs {(total - done) / 1e9:.1f} GB more in {blobs}, where {free / 1e9:.1f} GB are "
            "free (HF_HOME moves the cache)"
        )
    resumed = f", {done / 1e9:.2f} GB of it already here" if done else ""
    notice(f"{model}: downloading {total / 1e9:.2f} GB from {constants.ENDPOINT}{resumed}")
    stop = threading.Event()
    with progress() as bar, ThreadPoolExecutor(CONNECTIONS) as pool:
        task = bar.add_task("megabytes", total=total // MEGABYTE, completed=done // MEGABYTE)
        received = _Counter(lambda count: bar.update(task, completed=(done + count) // MEGABYTE))

        def fetch_one(file: RemoteFile) -> None:
            url = hf_hub_url(model, file.name, revision=revision)
            with FileLock(f"{parts[file.name]}.lock"):
                target = blobs / str(file.sha256)
                if not target.exists():  # another process may have finished it meanwhile
                    _fetch(url, parts[file.name], file.size, stop, received)
                    _accept(model, file, parts[file.name], target)

        futures = [pool.submit(fetch_one, file) for file in files]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


class _Counter:
    def __init__(self, report: Any) -> None:
        self._report, self._lock, self._count = report, threading.Lock(), 0

    def __call__(self, size: int) -> None:
        with self._lock:
            self._count += size
            self._report(self._count)


def _fetch(url: str, part: Path, size: int, stop: threading.Event, received: _Counter) -> None:
    """Fill ``part`` up to ``size`` bytes, going on from what it holds; a broken connection is tried again."""
    failures = 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        if have >= size:
            return
        try:
            headers = {**build_hf_headers(), "Range": f"bytes={have}-", "Accept-Encoding": "identity"}
            with get_session().stream(
                "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            ) as response:
                hf_raise_for_status(response)
                resumed = response.status_code == 206
                if not resumed:
                    received(-have)
                failures += 1  # until a byte arrives
                with part.open("ab" if resumed else "wb") as file:
                    for chunk in response.iter_bytes():  # as they arrive, or a broken one would be lost
                        file.write(chunk)
                        file.flush()
                        received(len(chunk))
                        failures = 0
                        if stop.is_set():
                            return
        except HTTPError as error:
            final = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
            failures += 1
            if final or failures >= ATTEMPTS or stop.is_set():
                raise
            time.sleep(1)
        if failures >= ATTEMPTS:
            raise OSError("the hub sends nothing")


def _accept(model: str, file: RemoteFile, part: Path, target: Path) -> None:
    if part.stat().st_size < file.size:
        return  # stopped: the rest comes next time
    with part.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != file.sha256:
        part.unlink()
        raise _mismatch(model, file.name, str(file.sha256), found)
    part.replace(target)


def _verify(model: str, repository: Path, snapshot: Path, checksums: Mapping[str, str | None]) -> None:
    """Check every file of a snapshot once; a note in the cache remembers which ones were, while unchanged.

    Without the hub's list (offline) a file's checksum is its name in the cache, which is the same.
    """
    note = repository / "xverse-verified.json"
    try:
        known = json.loads(note.read_text())
    except (OSError, ValueError):
        known = {}
    verified = {}
    for path in sorted(item for item in snapshot.iterdir() if item.is_file()):
        expected = checksums.get(path.name) or (path.readlink().name if path.is_symlink() else "")
        if len(expected) not in (40, 64):
            continue  # neither sha1 nor sha256: the hub gave no checksum
        state = path.stat()
        stamp = [expected, state.st_size, state.st_mtime_ns]
        if known.get(path.name) != stamp:
            found = _digest(path, expected)
            if found != expected:
                path.resolve().unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                raise _mismatch(model, path.name, expected, found)
        verified[path.name] = stamp
    if verified != known:
        try:
            with atomic_file(note) as temporary:
                temporary.write_text(json.dumps(verified))
        except (UserError, OSError):
            pass  # a shared cache may be read-only; then the check is made each time


def _digest(path: Path, expected: str) -> str:
    """sha256 for 64 hex digits, git's blob sha1 for 40."""
    if len(expected) == 40:
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _mismatch(model: str, name: str, expected: str, found: str) -> UserError:
    return UserError(
        f"{model}: {name} does not have the hub's checksum ({found[:12]}…, not {expected[:12]}…); "
        "it was removed, the same command fetches it again"
    )


def _text(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the hub's own progress bars: the files that are left are small."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
