"""What every measurement reports besides its figures: the code, the machine, and a bound for each figure."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xverse
from xverse import hardware
from xverse.config import UserError, installed_version

if TYPE_CHECKING:
    import torch

GPU_MATMUL = (8192, 8192, 8192)  # a size that fills a large GPU
MATMUL = (512, 4096, 4096)  # as in `doctor`: an attention projection of XVERSE-7B over 512 tokens
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class Row:
    """A line of the table. ``bound``: the target or measured peak to judge the figure by."""

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
    width = None if sys.stdout.isatty() else 120  # rich would fold at 80 columns
    Console(highlight=False, markup=False, emoji=False, width=width).print(table)


def finish(result: Mapping[str, Any]) -> None:
    """Print the last line: one JSON object with the figures and where they were measured."""
    print(json.dumps({**environment(), **result}, allow_nan=False), flush=True)


def environment() -> dict[str, Any]:
    """Commit (outside a checkout the version), versions of packages, hardware and time."""
    cores = hardware.cores()
    return {
        "commit": commit(),
        "version": xverse.__version__,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: installed_version(name) for name in PACKAGES},
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
    """The commit of the checkout, with ``-dirty`` if tracked files changed; otherwise the version."""
    root = Path(xverse.__file__).parents[2]
    if not (root / ".git").exists():  # installed; an enclosing repository would be another project's
        return xverse.__version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return xverse.__version__
    return done.stdout.strip() or xverse.__version__


def at_least(target: float, value: float, unit: str) -> str:
    """A minimum, and whether ``value`` meets it."""
    return f"target ≥ {target:g} {unit}: {'met' if value >= target else 'missed'}"


def at_most(target: float, value: float, unit: str) -> str:
    """A maximum, and whether ``value`` meets it."""
    return f"target ≤ {target:g} {unit}: {'met' if value <= target else 'missed'}"


def in_gb(size: float | None) -> float | None:
    """Bytes in GB (powers of ten); None stays None."""
    return None if size is None else round(size / 1e9, 4)


def say_gb(size: float | None) -> str:
    """GB as text, or "not measured"."""
    return "not measured" if size is None else f"{size:.3f} GB"


def count_threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def need_memory(size: float, device: torch.device | None = None) -> None:
    """Raises UserError if fewer than ``size`` bytes of memory are available, on a GPU or to the CPU."""
    on_gpu = device is not None and device.type == "cuda"
    available = hardware.available_memory(device) if device is not None and on_gpu else hardware.memory()[1]
    if available is not None and available < size:
        where = f" on {device}" if on_gpu else ""
        raise UserError(f"needs {size / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available{where}")
