"""What every measurement says beside its figures: which code, which machine, and the bound of each figure."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xverse
from xverse import hardware
from xverse.config import UserError

MATMUL = (512, 4096, 4096)  # what `doctor` times: an attention projection of XVERSE-7B over 512 tokens
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class Row:
    """A line of the table. ``bound`` is what the figure is to be judged by: a target or a measured peak."""

    figure: str
    result: str
    bound: str = ""


def show(title: str, rows: Iterable[Row]) -> None:
    """Print a table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in ("figure", "result", "bound"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(row.figure, row.result, row.bound)
    width = None if sys.stdout.isatty() else 120  # a file would be folded at 80
    Console(highlight=False, markup=False, emoji=False, width=width).print(table)


def finish(result: Mapping[str, Any]) -> None:
    """Print the last line: one JSON object with the figures and what they were measured on."""
    print(json.dumps({**environment(), **result}, allow_nan=False), flush=True)


def environment() -> dict[str, Any]:
    """Commit (or the version, outside a checkout), versions, machine and time."""
    cores = hardware.cores()
    return {
        "commit": commit(),
        "version": xverse.__version__,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "hardware": {
            "system": platform.platform(),
            "cpu": hardware.cpu_model(),
            "cores": cores.usable,
            "instruction_sets": hardware.instruction_sets(),
            "last_level_cache": hardware.last_level_cache(),
            "memory": hardware.memory()[0],
        },
    }


def commit() -> str:
    """The checkout's commit, with ``-dirty`` where tracked files were changed; else the version."""
    root = Path(xverse.__file__).parents[2]
    if not (root / ".git").exists():  # installed: a repository around it would be somebody else's
        return xverse.__version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return xverse.__version__
    return found.stdout.strip() or xverse.__version__


def at_least(target: float, value: float, unit: str) -> str:
    """A lower target and whether ``value`` meets it."""
    return f"target ≥ {target:g} {unit}: {'met' if value >= target else 'missed'}"


def at_most(target: float, value: float, unit: str) -> str:
    """An upper target and whether ``value`` meets it."""
    return f"target ≤ {target:g} {unit}: {'met' if value <= target else 'missed'}"


def in_gb(size: float | None) -> float | None:
    """Bytes in GB (powers of ten); None stays None."""
    return None if size is None else round(size / 1e9, 4)


def say_gb(size: float | None) -> str:
    """GB as text, or "not measured"."""
    return "not measured" if size is None else f"{size:.3f} GB"


def count_threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def need_memory(size: float) -> None:
    """Raises UserError where ``size`` bytes of memory are not available."""
    available = hardware.memory()[1]
    if available is not None and available < size:
        raise UserError(f"needs {size / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available")


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Torch's CPU threads for a while. Raises UserError for a count out of range."""
    if not 1 <= count <= 1024:
        raise UserError(f"threads: {count} is out of range (1 to 1024)")
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
