"""What a run says: notices and progress on stderr, records in JSONL. Results alone go to stdout."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console

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
        **options,
    )


class JsonlLog:
    """Append-only records, one JSON object a line, each with the time in seconds since the epoch."""

    def __init__(self, path: str | Path) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 - open for the run

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"time": round(time.time(), 3), **record}, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
