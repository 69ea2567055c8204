"""Runs untrusted Python in a confined process (Linux).

The process has a network namespace without connections and its own process namespace, limits on memory, time
and files, an empty folder that is removed afterwards, and an empty environment. This is not a defence against
kernel exploits: run hostile code in a virtual machine.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from xverse.config import UserError

MEMORY = 1 << 30  # bytes of address space
_CONFINED = Path(__file__).with_name("confined.py")
_READY = b"confined\n"


@dataclass(frozen=True)
class RunResult:
    ok: bool
    stderr: str  # what it wrote there, or why it was stopped


def run_python(program: str, seconds: float) -> RunResult:
    """Run ``program``; the result is not ok if it fails or exceeds ``seconds``. Raises UserError, before
    running anything, where this machine cannot isolate a process from the network."""
    if sys.platform != "linux":
        raise UserError("code runs on Linux only: elsewhere it cannot be isolated from the network")
    with tempfile.TemporaryDirectory(prefix="xverse-sandbox-") as folder:
        path = Path(folder) / "program.py"
        path.write_text(program, encoding="utf-8")
        limits = [str(int(seconds) + 1), str(MEMORY)]
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_CONFINED), str(path), *limits],
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        late = False
        try:
            stdout, stderr = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and its descendants
        if late:
            process.communicate()
            return RunResult(False, f"stopped after {seconds:g} seconds")
    if not stdout.startswith(_READY):
        reason = stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise UserError(f"this machine cannot isolate a process from the network ({reason}); no code was run")
    return RunResult(process.returncode == 0, stderr.decode(errors="replace"))
