"""Wall time of ``xverse --help`` and of a first answer from the embedded model."""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xverse.bench.options import positive
from xverse.bench.report import Row, at_most, show
from xverse.config import UserError
from xverse.formats import resolve
from xverse.log import notice
from xverse.values import add_model

HELP_TARGET = 0.3  # seconds, median
CHAT_TARGET = 5.0  # seconds, median
QUESTION = "你好"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--help-runs", type=positive, default=7, metavar="N", help="processes that print the help"
    )
    parser.add_argument("--chat-runs", type=positive, default=3, metavar="N", help="processes that answer")
    add_model(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    return measure(**vars(args))


def measure(help_runs: int = 7, chat_runs: int = 3, model: str = "nano") -> dict[str, Any]:
    """Wall time of fresh processes. Without the model, ``chat_not_measured`` says why there is no reply."""
    notice(f"startup: {help_runs} × xverse --help, {chat_runs} × xverse chat --ask {QUESTION}")
    helps, _ = wall_times(["--help"], help_runs)
    result: dict[str, Any] = {
        "bench": "startup",
        "help_s": round(statistics.median(helps), 4),
        "help_runs_s": helps,
        "help_target_s": HELP_TARGET,
        "chat_s": None,
        "chat_target_s": CHAT_TARGET,
    }
    label, chat = f"xverse chat --ask {QUESTION}", Row("", "")
    try:
        resolve(model)
    except UserError as error:
        result["chat_not_measured"] = str(error)
        chat = Row(label, f"not measured: {error}", f"target ≤ {CHAT_TARGET:g} s")
    else:
        named = [] if model == "nano" else ["--model", model]
        chats, reply = wall_times(["chat", *named, "--ask", QUESTION], chat_runs)
        result |= {"chat_s": round(statistics.median(chats), 4), "chat_runs_s": chats, "chat_reply": reply}
        chat = Row(label, _seconds(chats), at_most(CHAT_TARGET, result["chat_s"], "s"))
    rows = [Row("xverse --help", _seconds(helps), at_most(HELP_TARGET, result["help_s"], "s")), chat]
    show("startup: wall time of fresh processes", rows)
    return result


def wall_times(arguments: Sequence[str], runs: int) -> tuple[list[float], str]:
    """Seconds of each of ``runs`` processes ``xverse ARGUMENTS``, and the stdout of the first.

    Raises UserError with the last line of stderr if one fails.
    """
    command = [*program(), *arguments]
    times: list[float] = []
    stdout = ""
    for number in range(runs):
        start = time.perf_counter()
        process = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8")
        times.append(round(time.perf_counter() - start, 4))
        if process.returncode:
            lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
            raise UserError(f"xverse {' '.join(arguments)} failed: {lines[-1]}")
        stdout = stdout if number else process.stdout.strip()
    return times, stdout


def program() -> list[str]:
    """The command installed beside this interpreter; otherwise the module."""
    script = shutil.which("xverse", path=str(Path(sys.executable).parent))
    return [script] if script else [sys.executable, "-m", "xverse.cli"]


def _seconds(times: Sequence[float]) -> str:
    runs = ", ".join(f"{seconds:.2f}" for seconds in times)
    return f"{statistics.median(times):.3f} s (median of {runs})"
