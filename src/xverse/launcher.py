"""Processes that a launcher started end with it, however it ended and whatever they are doing."""

from __future__ import annotations

import os
import signal
import threading
import time

# Set in every process that torchrun (also under accelerate launch) or deepspeed starts.
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")
POLL_SECONDS = 1.0


def end_with_launcher() -> None:
    """Watch the launcher from a thread. When it has ended, this process gets SIGTERM: while it trains it
    saves a checkpoint and stops, at any other time it ends at once. Without a launcher nothing is watched,
    because a run may outlive its shell.
    """
    if not any(name in os.environ for name in LAUNCHERS):
        return
    threading.Thread(target=_watch, args=(os.getppid(),), name="launcher", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
