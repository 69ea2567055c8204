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
    end_with(os.getppid(), signal.SIGTERM)


def end_with(parent: int, number: signal.Signals) -> None:
    """Send this process the signal ``number`` once its ``parent`` has ended."""
    threading.Thread(target=_watch, args=(parent, number), name="launcher", daemon=True).start()


def _watch(parent: int, number: signal.Signals) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), number)
