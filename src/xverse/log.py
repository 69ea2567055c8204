"""What a run says: notices and progress on stderr, records in JSONL. Results alone go to stdout."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console

from xverse.config import UserError

if TYPE_CHECKING:
    from rich.progress import Progress

console = Console(stderr=True, highlight=False)


def notice(text: str) -> None:
    """Tell the user something that is no result. Never parsed as markup."""
    console.print(text, markup=False, emoji=False, soft_wrap=True, style="dim")


def progress(**options: Any) -> Progress:
    """A progress bar with count, elapsed time and ETA on stderr; it disappears when done."""
    # A tenth of a second to import: only commands that take long show a bar.
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        # Elsewhere all that is left of a bar is an empty line.
        **{"disable": not console.is_terminal, **options},
    )


class JsonlLog:
    """Append-only records, one JSON object a line, each with the time in seconds since the epoch.

    Raises UserError where the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            half = _ends_half_way(self._path)
            self._file: TextIO = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._failed(error) from error
        if half:
            self._file.write("\n")  # or the next record would be lost with the half one

    def write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps({"time": round(time.time(), 3), **record}, ensure_ascii=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written has been told by write
            self._file.close()

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"{self._path}: cannot be written ({error.strerror})")


def _ends_half_way(path: Path) -> bool:
    """Whether the last line of a file was cut off, as a full disk does."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"
