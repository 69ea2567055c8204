"""Notices and progress on stderr, records in JSON lines. Only results go to stdout."""

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
    """Print a line that is not a result, on stderr. It is never parsed as markup."""
    console.print(text, markup=False, emoji=False, soft_wrap=True, style="dim")


def progress(**options: Any) -> Progress:
    """A progress bar with count, elapsed time and ETA on stderr; it disappears when done."""
    # Importing this takes 0.1 s, so only commands that show a bar pay for it.
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
        # Outside a terminal a bar would leave an empty line.
        **{"disable": not console.is_terminal, **options},
    )


class JsonlLog:
    """Append-only records, one JSON object per line, each with the time in seconds since the epoch.

    Raises UserError if the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            truncated = _is_truncated(self._path)
            self._file: TextIO = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._failed(error) from error
        if truncated:
            self._file.write("\n")  # keeps the next record apart from the truncated one

    def write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps({"time": round(time.time(), 3), **record}, ensure_ascii=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # write has raised already
            self._file.close()

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"{self._path}: cannot be written ({error.strerror})")


def _is_truncated(path: Path) -> bool:
    """Whether the last line of a file is incomplete, as after a full disk."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"
