"""What ends a process and what does not: a hang, a suspension, a launcher that is killed, missing peers."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from xverse.config import UserError
from xverse.launcher import end_with_launcher
from xverse.train import rendezvous
from xverse.train.parallel import ALONE, World
from xverse.train.survival import EXIT_HUNG, Watchdog


def forked(work: Callable[[], None]) -> int:
    """The id of a child that does ``work`` and exits with 0."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_stopped_process_is_not_hung_and_a_hung_one_is(tmp_path: Path) -> None:
    def wait(seconds: float) -> Callable[[], None]:
        def work() -> None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            with Watchdog(tmp_path / str(seconds), ALONE, 2.0) as watchdog:
                watchdog.beat(0, "step")
                time.time = lambda: 4e9  # somebody sets the clock
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    time.sleep(0.05)

        return work

    stopped, hung = forked(wait(3.5)), forked(wait(60))
    time.sleep(0.3)
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(3.4)
    os.kill(stopped, signal.SIGCONT)
    assert code_of(stopped) == 0, "it ran for less than two seconds"
    assert code_of(hung) == EXIT_HUNG


@pytest.mark.parametrize(
    ("size", "seconds", "interval"), [(1, 0, 1), (8, 1800, 1), (1024, 1800, 64), (1024, 40, 10)]
)
def test_many_processes_write_few_heartbeats(
    tmp_path: Path, size: int, seconds: float, interval: float
) -> None:
    assert Watchdog(tmp_path, World(size=size), seconds)._interval == interval


def ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("launched", [True, False])
def test_processes_end_with_their_launcher_and_only_with_one(tmp_path: Path, launched: bool) -> None:
    file = tmp_path / "pid"

    def rank() -> None:
        os.environ.pop("TORCHELASTIC_RUN_ID", None)
        if launched:
            os.environ["TORCHELASTIC_RUN_ID"] = "run"
        end_with_launcher()
        (tmp_path / "new").write_text(str(os.getpid()))
        (tmp_path / "new").rename(file)
        time.sleep(100)

    def launch() -> None:
        forked(rank)
        time.sleep(100)

    launcher = forked(launch)
    while not file.exists():
        time.sleep(0.01)
    process = int(file.read_text())
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    deadline = time.monotonic() + (20 if launched else 2.5)
    while time.monotonic() < deadline and not ended(process):
        time.sleep(0.05)
    assert ended(process) is launched
    if not launched:
        os.kill(process, signal.SIGKILL)


def test_processes_that_never_come_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "START", datetime.timedelta(seconds=1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(UserError, match="the processes of this run did not find each other"):
        rendezvous.fresh_store(datetime.timedelta(hours=4))
