"""Counting the words of texts of any size, in bounded memory and resumable.

The texts are split into parts. A thread counts one part at a time in a hash table, which is sorted and
written to disk whenever it is full; a marker makes a part complete. Finally all sorted files are merged into
one. Started again, counting resumes with the missing parts; an output folder of other texts is refused.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xverse.config import UserError
from xverse.files import write_text
from xverse.log import notice
from xverse.texts import BLOCK, ReadReport, read_json, read_texts
from xverse.tokenizer import native

VERSION = 1  # of the file format and of the definition of a word
PARTS = 16  # of a corpus, at least, if it is large enough
SMALLEST_PART, LARGEST_PART = 4 << 20, 2 << 30  # bytes
BATCH = 1 << 20  # bytes of texts in one call
FAN_IN = 256  # files merged at once


@dataclass(frozen=True)
class Span:
    """A whole file (``end`` -1), or the lines of a .txt file that begin in its bytes begin … end - 1."""

    path: Path
    begin: int = 0
    end: int = -1


@dataclass(frozen=True)
class WordCounts:
    """A file of counted words (csrc/words.h), and totals."""

    path: Path
    different: int
    occurrences: int
    texts: int
    bytes: int  # of the texts
    long_words: int  # skipped: longer than 16,384 bytes


def count_words(files: Sequence[Path], folder: Path, *, memory: int, threads: int) -> WordCounts:
    """Count the words of text files into ``folder``, in about ``memory`` bytes.

    Raises UserError if the folder holds counts of other texts, the disk is full, or no file has a usable
    text.
    """
    described = [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    settings = {"version": VERSION, "longest_word": native.LONGEST_WORD, "block": BLOCK, "files": described}
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    done = _read_marker(folder / "words.json", digest)
    if done is not None and _complete(folder, [["words", done["size"]]]):
        return _result(folder, done)
    started = folder / "counting.json"
    if folder.is_dir() and any(folder.iterdir()) and _read_marker(started, digest) is None:
        raise UserError(f"{folder}: is not empty and holds no word counts; name another folder")
    write_text(started, json.dumps({"digest": digest, **settings}))

    parts = plan_parts(files)
    stop = threading.Event()
    with ThreadPoolExecutor(threads) as pool:
        futures = [
            pool.submit(_count_part, folder, number, part, digest, memory // threads, stop)
            for number, part in enumerate(parts)
        ]
        try:
            markers = [future.result() for future in futures]
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    _notify(files, markers)
    sums = {key: sum(marker[key] for marker in markers) for key in ("texts", "bytes", "long_words")}
    if not sums["texts"]:
        remove_counts(folder)
        raise UserError(f"{files[0].parent if len(files) > 1 else files[0]}: no usable text in these files")
    runs = [folder / name for marker in markers for name, _ in marker["runs"]]
    different, occurrences, size = _merge_all(runs, folder)
    done = {"digest": digest, "size": size, "different": different, "occurrences": occurrences, **sums}
    write_text(folder / "words.json", json.dumps(done))
    for path in folder.glob("part-*"):
        path.unlink()
    return _result(folder, done)


def plan_parts(files: Sequence[Path]) -> list[list[Span]]:
    """The parts into which ``count_words`` splits files; each is counted separately."""
    total = sum(path.stat().st_size for path in files)
    return split_into_parts(files, min(max(total // PARTS, SMALLEST_PART), LARGEST_PART))


def split_into_parts(files: Iterable[Path], size: int) -> list[list[Span]]:
    """Spans of about ``size`` bytes together, in the files' order: small files are joined, .txt files cut."""
    parts: list[list[Span]] = []
    room = 0
    for path in files:
        length = path.stat().st_size
        cut = size if path.suffix == ".txt" else length
        for begin in range(0, length, max(cut, 1)):
            end = min(begin + cut, length)
            if room <= 0:
                parts.append([])
                room = size
            parts[-1].append(Span(path) if cut >= length else Span(path, begin, end))
            room -= end - begin
    return parts


def _count_part(
    folder: Path, number: int, part: list[Span], digest: str, memory: int, stop: threading.Event
) -> dict[str, Any]:
    name = f"part-{number:05}"
    marker = _read_marker(folder / f"{name}.json", digest)
    if marker is not None and _complete(folder, marker["runs"]):
        return marker
    reports = [ReadReport() for _ in part]
    counter = native.Counter(folder / name, memory)
    with _disk_errors(folder):
        try:
            batch: list[bytes] = []
            size = 0
            for span, report in zip(part, reports, strict=True):
                for text in read_texts(span.path, report, span.begin, span.end):
                    batch.append(text)
                    size += len(text)
                    if stop.is_set():  # another part failed, or the user interrupted
                        raise CancelledError
                    if size >= BATCH:
                        counter.add(batch)
                        batch, size = [], 0
            if batch:
                counter.add(batch)
            _, long_words, runs = counter.finish()
        finally:
            counter.close()
    names = [f"{name}.{run}" for run in range(runs)]
    marker = {
        "digest": digest,
        "runs": [[run, (folder / run).stat().st_size] for run in names],
        "texts": sum(report.read for report in reports),
        "bytes": sum(report.bytes for report in reports),
        "long_words": long_words,
        "files": [[str(span.path), asdict(report)] for span, report in zip(part, reports, strict=True)],
    }
    write_text(folder / f"{name}.json", json.dumps(marker))
    return marker


def _merge_all(runs: list[Path], folder: Path) -> tuple[int, int, int]:
    target = folder / "words"
    temporary = folder / "words.tmp"
    with _disk_errors(folder):
        level = 0
        while len(runs) > FAN_IN:  # into fewer, larger files; those in markers stay until the end
            level += 1
            merged = []
            for number, begin in enumerate(range(0, len(runs), FAN_IN)):
                merged.append(folder / f"part-merged-{level}.{number}")
                native.merge_words(runs[begin : begin + FAN_IN], merged[-1])
            runs = merged
        figures = native.merge_words(runs, temporary)
        temporary.replace(target)
    return figures


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"{folder}: the disk is full; free space and run the command again, finished parts are kept"
        ) from error


def _notify(files: Sequence[Path], markers: list[dict[str, Any]]) -> None:
    """Report what was skipped of each file, once for a file counted in several parts."""
    reports = {str(path): ReadReport() for path in files}
    for marker in markers:
        for name, values in marker["files"]:
            report = reports[name]
            for key, value in values.items():
                setattr(report, key, getattr(report, key) + value)
    for name, report in reports.items():
        if not report.read and len(files) == 1:
            continue  # the error reports it
        if report.describe() or not report.read:
            notice(f"{name}: {report.describe() or 'no usable text'}")
    long_words = sum(marker["long_words"] for marker in markers)
    if long_words:
        notice(f"{long_words} words longer than {native.LONGEST_WORD} bytes were skipped")


def _read_marker(path: Path, digest: str) -> dict[str, Any] | None:
    """The contents of a marker, None if there is none. Raises UserError for a marker of other texts."""
    if not path.exists():
        return None
    values = read_json(path)
    if not isinstance(values, dict) or values.get("digest") != digest:
        raise UserError(
            f"{path.parent}: holds word counts of other texts or of another version; remove it or name "
            "another folder"
        )
    return values


def _complete(folder: Path, files: list[list[Any]]) -> bool:
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files)


def _result(folder: Path, done: dict[str, Any]) -> WordCounts:
    keys = ("different", "occurrences", "texts", "bytes", "long_words")
    return WordCounts(folder / "words", **{key: done[key] for key in keys})


def remove_counts(folder: Path) -> None:
    """Remove a folder created by ``count_words``."""
    if (folder / "counting.json").is_file():
        shutil.rmtree(folder)
