"""Models and datasets from Hugging Face, resumed where a download broke off and verified by checksum.

Files in Git LFS are downloaded here rather than by ``snapshot_download``: huggingface_hub 2 starts a file
over if the process that downloaded it was killed (``tests/hub`` shows it), and a shard has gigabytes. They go
into the hub's own cache under the names that it uses, so every other program finds them there.
"""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
from xverse.files import write_text
from xverse.hub.resolve import similar
from xverse.log import notice, progress

ATTEMPTS = 5  # consecutive ones that receive nothing
CONNECTIONS = 4
MEGABYTE = 10**6


@dataclass(frozen=True)
class RemoteFile:
    """A file in the hub's listing, with its ``sha256`` if it is in Git LFS and its git blob id."""

    name: str
    size: int
    sha256: str | None
    blob_id: str | None

    @property
    def checksum(self) -> str | None:
        return self.sha256 or self.blob_id


def fetch(
    name: str,
    choose: Callable[[list[str]], list[str]],
    *,
    repo_type: str = "model",
    cached: Sequence[str] = ("config.json",),
) -> Path:
    """Download a repository ``org/name`` into the hub's cache, or find it there, and verify it.

    ``choose`` picks the files from the names in the repository. ``cached``: patterns of files that a usable
    copy in the cache holds, for work without network. Raises UserError, in one line, for an unknown id, no
    network, a full disk and a wrong checksum; a file with a wrong checksum is removed, so that the next call
    fetches it again.
    """
    repository = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=repo_type)
    try:
        describe = HfApi().dataset_info if repo_type == "dataset" else HfApi().model_info
        info = describe(name, files_metadata=True)
    except GatedRepoError:
        raise UserError(f"{name}: request access on its page, then set HF_TOKEN") from None
    except (RepositoryNotFoundError, HFValidationError):
        hint = f"{similar(name)} (" + ("a directory must exist; " if repo_type == "model" else "")
        raise UserError(
            f"{constants.ENDPOINT} has no {repo_type} '{name}'{hint}a private one needs HF_TOKEN)"
        ) from None
    except (OfflineModeIsEnabled, HTTPError, OSError) as error:
        return _from_cache(name, repo_type, cached, repository, error)
    listed = [
        RemoteFile(item.rfilename, item.size or 0, item.lfs.sha256 if item.lfs else None, item.blob_id)
        for item in info.siblings or []
    ]
    chosen = set(choose([file.name for file in listed]))
    files = [file for file in listed if file.name in chosen]
    try:
        url_of = partial(hf_hub_url, name, repo_type=repo_type, revision=info.sha)
        _download(name, url_of, repository / "blobs", [file for file in files if file.sha256])
        with _quiet():
            patterns = [glob.escape(file) for file in sorted(chosen)]
            snapshot = Path(snapshot_download(name, repo_type=repo_type, allow_patterns=patterns))
    except (HTTPError, OSError) as error:
        raise UserError(f"{name}: the download stopped ({_text(error)}); run it again to resume") from error
    _verify(name, repository, snapshot, {file.name: file.checksum for file in files})
    return snapshot


def _from_cache(
    name: str, repo_type: str, patterns: Sequence[str], repository: Path, error: Exception
) -> Path:
    offline = isinstance(error, OfflineModeIsEnabled)
    why = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} cannot be reached ({_text(error)})"
    try:
        snapshot = Path(
            snapshot_download(name, repo_type=repo_type, allow_patterns=list(patterns), local_files_only=True)
        )
    except (LocalEntryNotFoundError, OSError):
        raise UserError(f"{name}: not in the cache, and {why}") from None
    if not offline:
        notice(f"{name}: {why}; using the cached copy")
    _verify(name, repository, snapshot, {})
    return snapshot


def _download(name: str, url_of: Callable[[str], str], blobs: Path, files: list[RemoteFile]) -> None:
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
            f"{name}: needs {(total - done) / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free in {blobs} "
            "(set HF_HOME to move the cache)"
        )
    resumed = f", {done / 1e9:.2f} GB of it already downloaded" if done else ""
    notice(f"{name}: downloading {total / 1e9:.2f} GB from {constants.ENDPOINT}{resumed}")
    stop = threading.Event()
    with progress() as bar, ThreadPoolExecutor(CONNECTIONS) as pool:
        task = bar.add_task("megabytes", total=total // MEGABYTE, completed=done // MEGABYTE)

        def received(size: int) -> None:
            bar.advance(task, size / MEGABYTE)

        def fetch_one(file: RemoteFile) -> None:
            url = url_of(file.name)
            with FileLock(f"{parts[file.name]}.lock"):
                target = blobs / str(file.sha256)
                if not target.exists():  # another process may have finished it
                    _fetch(url, parts[file.name], file.size, stop, received)
                    _accept(name, file, parts[file.name], target)

        futures = [pool.submit(fetch_one, file) for file in files]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _fetch(url: str, part: Path, size: int, stop: threading.Event, received: Callable[[int], None]) -> None:
    """Download ``url`` into ``part``, resuming after its present size and after broken connections."""
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
                failures += 1  # reset when a byte arrives
                with part.open("ab" if resumed else "wb") as file:
                    for chunk in response.iter_bytes():  # as they arrive, so that none is lost
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
            raise OSError("the hub sends no data")


def _accept(name: str, file: RemoteFile, part: Path, target: Path) -> None:
    if part.stat().st_size < file.size:
        return  # stopped; the next call resumes
    expected = str(file.sha256)
    if (digest := _digest(part, expected)) != expected:
        part.unlink()
        raise _mismatch(name, file.name, expected, digest)
    part.replace(target)


def _verify(name: str, repository: Path, snapshot: Path, checksums: Mapping[str, str | None]) -> None:
    """Verify every file of a snapshot once; a note in the cache records those that were verified, by size and
    time. Offline, a file's checksum is its blob's name in the cache.
    """
    note = repository / "xverse-verified.json"
    try:
        known = json.loads(note.read_text())
    except (OSError, ValueError):
        known = {}
    verified = {}
    for path in sorted(item for item in snapshot.rglob("*") if item.is_file()):
        file = path.relative_to(snapshot).as_posix()
        expected = checksums.get(file) or (path.readlink().name if path.is_symlink() else "")
        if len(expected) not in (40, 64):
            continue  # neither sha1 nor sha256
        state = path.stat()
        stamp = [expected, state.st_size, state.st_mtime_ns]
        if known.get(file) != stamp:
            digest = _digest(path, expected)
            if digest != expected:
                path.resolve().unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                raise _mismatch(name, file, expected, digest)
        verified[file] = stamp
    if verified != known:
        with suppress(UserError, OSError):  # a read-only cache: verify each time
            write_text(note, json.dumps(verified))


def _digest(path: Path, expected: str) -> str:
    """The digest of a file: sha256 if ``expected`` has 64 hex digits, git's blob sha1 for 40."""
    if len(expected) == 40:
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _mismatch(name: str, file: str, expected: str, digest: str) -> UserError:
    return UserError(
        f"{name}: {file} does not have the hub's checksum ({digest[:12]}…, not {expected[:12]}…); it was "
        "removed, and the same command fetches it again"
    )


def _text(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """Disable the hub's progress bars; the remaining files are small."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
