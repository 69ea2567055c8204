"""Python that nobody has read, in a process of its own (Linux).

It has a network namespace without any connection, sees no processes but its own, and has little memory, time
and files, an empty folder that is removed afterwards, and none of our environment. It is no defence against
somebody who means harm and knows of a hole in the kernel: such code belongs into a virtual machine.
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
class Result:
    ok: bool
    said: str  # the end of what it wrote to stderr, or why it was stopped


def run_python(program: str, seconds: float, memory: int = MEMORY) -> Result:
    """Run ``program``; not ok where it fails, or takes longer. Raises UserError where this machine cannot cut
    a process off from the network: then nothing of it has run."""
    if sys.platform != "linux":
        raise UserError("code is run on Linux only: elsewhere it cannot be cut off from the network")
    with tempfile.TemporaryDirectory(prefix="xverse-sandbox-") as folder:
        path = Path(folder) / "program.py"
        path.write_text(program, encoding="utf-8")
        limits = [str(int(seconds) + 1), str(memory)]
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
            printed, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and all that it started
        if late:
            process.communicate()
            return Result(False, f"stopped after {seconds:g} seconds")
    if not printed.startswith(_READY):
        reason = said.decode(errors="replace").strip().rpartition("\n")[2]
        raise UserError(f"this machine cannot cut a process off from the network ({reason}); no code was run")
    return Result(process.returncode == 0, said.decode(errors="replace"))
