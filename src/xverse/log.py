"""Notices and progress on stderr, records in JSON lines. Only results go to stdout."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from rich import progress as bars

    return bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
        console=console,
        transient=True,
        # Outside a terminal a bar would leave an empty line.
        **{"disable": not console.is_terminal, **options},
    )


class JsonlLog:
    """Append-only records, one JSON object per line, each with the time in seconds since the epoch.

    A full disk must not end what is being recorded: records that cannot be written are reported once, held
    in memory up to ``HELD`` bytes, and written when there is room. Raises UserError if the file cannot be
    opened.
    """

    HELD = 1 << 24

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # A line break keeps the next record apart from a truncated one.
            self._waiting = b"\n" if _is_truncated(self._path) else b""
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written ({error.strerror})") from error
        self._reported = False

    def write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps({"time": round(time.time(), 3), **record}, ensure_ascii=False) + "\n"
        if len(self._waiting) < self.HELD:
            self._waiting += line.encode()
        self._flush()

    def close(self) -> None:
        self._flush()
        with contextlib.suppress(OSError):
            self._file.close()

    def _flush(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._reported = False
        except OSError as error:
            if not self._reported:
                notice(f"WARNING: {self._path} cannot be written ({error.strerror}); its records wait")
            self._reported = True


def _is_truncated(path: Path) -> bool:
    """Whether the last line of a file is incomplete, as after a full disk."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"
