"""Signals, bad steps and heartbeats: what keeps a run alive and shows its state to other programs.

Exit codes of ``xverse pretrain``: 0 finished; 1 an error in the program; 2 a user's mistake or a run that
diverged, where a restart does not help; 69 a slow process (preflight.py), restart without its node; 75 hung,
restart; 130 stopped on request and saved, restart to continue. torchrun exits with 1 and reports these codes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xverse.train.parallel import World
from xverse.train.settings import TrainConfig

EXIT_HUNG = 75  # EX_TEMPFAIL of sysexits.h
HEARTBEATS = 16  # files a second that a shared file system gets from all processes
PHASES = ("starting", "data", "counting", "step", "validation", "checkpoint")  # in the order of a step


class Interrupted(KeyboardInterrupt):
    """The run was stopped by a signal and has saved a checkpoint."""


@dataclass
class Requests:
    """What this process received: SIGINT and SIGTERM request to save and stop, SIGUSR1 to save."""

    stop: bool = False
    save: bool = False


@contextlib.contextmanager
def requests() -> Iterator[Requests]:
    """Listen for signals; a second SIGINT interrupts at once."""
    requested = Requests()

    def handle(number: int, frame: Any) -> None:
        if number == signal.SIGUSR1:
            requested.save = True
            return
        if requested.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        requested.stop = True

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Steadiness:
    """Decides which steps are applied. Its state belongs in checkpoints, so that a resumed run makes the same
    decisions."""

    config: TrainConfig
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    bad: int = 0  # in a row
    rollbacks: int = 0

    def judge(self, loss: float, norm: float) -> str:
        """Why a step must be skipped, or an empty string. ``loss`` is in nats, ``norm`` the gradient norm
        before clipping."""
        reason = ""
        if not math.isfinite(loss) or not math.isfinite(norm):
            reason = f"loss {loss}, gradient norm {norm}"
        elif self.config.skip_zscore:
            for name, value, earlier in (("loss", loss, self.losses), ("gradient norm", norm, self.norms)):
                score = zscore(value, earlier)
                if len(earlier) >= self.config.skip_window and score > self.config.skip_zscore:
                    reason = f"{name} {value:.3f} is {score:.1f} standard deviations above the steps before"
        if reason:
            self.bad += 1
            return reason
        self.bad = 0
        if self.config.skip_zscore:
            self.losses = [*self.losses, loss][-self.config.skip_window :]
            self.norms = [*self.norms, norm][-self.config.skip_window :]
        return ""

    def state(self) -> dict[str, Any]:
        return {"losses": self.losses, "norms": self.norms, "bad": self.bad, "rollbacks": self.rollbacks}

    def restore(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, value)


def zscore(value: float, earlier: list[float]) -> float:
    """By how many (population) standard deviations ``value`` is above the mean of ``earlier``."""
    if not earlier:
        return 0.0
    mean = math.fsum(earlier) / len(earlier)
    deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in earlier) / len(earlier))
    return (value - mean) / max(deviation, 1e-12)


class Watchdog:
    """A thread in every process that writes heartbeats and ends a process that hangs.

    ``OUT/heartbeats/RANK.json`` holds the step, its phase, since when, the process id and host, and the
    seconds until the next one: as many that all processes together write at most HEARTBEATS files a second.
    After ``seconds`` without progress (0: no limit) the thread prints the stack of the main thread and which
    process is furthest behind, and exits with 75. Time in which this thread did not run either, because the
    process was stopped or the machine suspended, does not count.
    """

    def __init__(self, out: Path, world: World, seconds: float) -> None:
        self._folder, self._world, self._seconds = out / "heartbeats", world, seconds
        self._main = threading.get_ident()
        self._at: tuple[int, str, float] = (0, "starting", time.time())
        self._pause = min(1.0, seconds / 4) if seconds else 1.0
        self._interval = max(self._pause, min(world.size / HEARTBEATS, seconds / 4 or math.inf))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._stopped.set()
        self._thread.join()
        status = "finished" if kind is None else "stopped" if issubclass(kind, Interrupted) else "failed"
        self._write(status)

    def beat(self, step: int, phase: str) -> None:
        """The process has reached ``phase`` (one of PHASES) of ``step``."""
        self._at = (step, phase, time.time())

    def _watch(self) -> None:
        self._write("running")
        before, quiet, seen = time.monotonic(), 0.0, self._at
        due = before + self._interval * (self._world.rank + 1) / self._world.size  # not all at once
        while not self._stopped.wait(self._pause):
            now = time.monotonic()
            quiet = quiet + min(now - before, 2 * self._pause) if self._at is seen else 0.0
            before, seen = now, self._at
            if now >= due:
                self._write("running")
                due = now + self._interval
            if self._seconds and quiet > self._seconds:
                self._give_up(*seen[:2])

    def _write(self, status: str) -> None:
        step, phase, since = self._at
        values = {
            "rank": self._world.rank,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "interval": self._interval,
            "status": status,
            "step": step,
            "phase": phase,
        }
        # A full disk must not end a run that could continue.
        with contextlib.suppress(OSError):
            file = self._folder / f"{self._world.rank}.json"
            temporary = file.with_suffix(".tmp")
            temporary.write_text(
                json.dumps({**values, "since": since, "time": time.time()}), encoding="utf-8"
            )
            temporary.replace(file)

    def _give_up(self, step: int, phase: str) -> None:
        self._write("hung")
        stack = "".join(traceback.format_stack(sys._current_frames()[self._main]))
        sys.stderr.write(
            f"xverse: rank {self._world.rank} hung at step {step + 1} ({phase}) for {self._seconds:g} "
            f"seconds; furthest behind: {self._behind()}; its stack:\n{stack}"
        )
        sys.stderr.flush()
        os._exit(EXIT_HUNG)

    def _behind(self) -> str:
        places = []
        for rank in range(self._world.size):
            with contextlib.suppress(OSError, ValueError, KeyError):
                seen = json.loads((self._folder / f"{rank}.json").read_text(encoding="utf-8"))
                places.append((seen["step"], PHASES.index(seen["phase"]), rank))
        if not places:
            return "unknown"
        least = min(places)[:2]
        ranks = ", ".join(str(rank) for *place, rank in places if tuple(place) == least)
        return f"rank {ranks} (step {least[0] + 1}, {PHASES[least[1]]})"
