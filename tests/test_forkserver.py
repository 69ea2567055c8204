"""A forked program is, to the test that starts it, what a Python process of its own is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import forkserver

REPORT = """
import json, os, sys
print(json.dumps([
    __name__, sys.argv, sys.path[0], os.getcwd(), os.environ.get("HERE"), os.getsid(0) == os.getpid(),
    sorted(os.listdir("/proc/self/fd")), sys.stdin.read(),
]))
print("error", file=sys.stderr)
sys.exit(7)
"""


@pytest.mark.parametrize("kind", ["-c", "-m", "script", "-"])
def test_a_program_sees_what_a_new_interpreter_shows_it(kind: str, tmp_path: Path) -> None:
    (tmp_path / "report.py").write_text(REPORT)
    words = {"-c": ["-c", REPORT], "-m": ["-m", "report"], "script": ["report.py"], "-": ["-"]}[kind]
    options: dict[str, Any] = {
        "input": REPORT if kind == "-" else "text",
        "cwd": tmp_path,
        "env": {**os.environ, "HERE": "yes"},
        "start_new_session": True,
    }
    command = [sys.executable, *words, "--flag", "ü"]
    there = subprocess.run(command, capture_output=True, text=True, **options)
    here = forkserver.run(command, capture_output=True, text=True, **options)
    assert there.returncode == 7
    assert json.loads(there.stdout)[0] == "__main__"
    assert (here.returncode, here.stdout, here.stderr) == (there.returncode, there.stdout, there.stderr)


def test_signals_and_exit_statuses() -> None:
    pipe = {"stdout": subprocess.PIPE, "text": True}
    code = (
        "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # workers ignore it
        "print('ready', flush=True); time.sleep(60)"
    )
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        with forkserver.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, **pipe) as process:
            assert process.stdout.readline() == "ready\n"
            assert process.poll() is None
            assert f"PPid:\t{os.getpid()}\n" in Path(f"/proc/{process.pid}/status").read_text()
            process.send_signal(number)
        assert process.returncode == -number
    with pytest.raises(subprocess.TimeoutExpired):
        forkserver.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, timeout=0.2)


@pytest.mark.parametrize("code", ["import sys; sys.exit(130)", "raise KeyboardInterrupt"])
def test_an_interruption_that_was_handled_is_an_exit_status(code: str) -> None:
    options: dict[str, Any] = {"stderr": subprocess.DEVNULL}
    there = subprocess.run([sys.executable, "-c", code], **options).returncode
    assert forkserver.run([sys.executable, "-c", code], **options).returncode == there


def test_the_end_of_a_program() -> None:
    """Threads end, exit handlers run, and an exception is reported with status 1."""
    code = (
        "import atexit, threading, time\n"
        "atexit.register(print, 'exit')\n"
        "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()\n"
        "print('main')\n"
        "raise ValueError('wrong')"
    )
    done = forkserver.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "main\nthread\nexit\n")
    assert done.stderr.endswith("ValueError: wrong\n")
    for code in ("import sys; sys.exit('why')", "import sys; sys.exit()", "raise SystemExit(300)"):
        there, here = (
            runner([sys.executable, "-c", code], capture_output=True, text=True)
            for runner in (subprocess.run, forkserver.run)
        )
        assert (here.returncode, here.stderr) == (there.returncode, there.stderr)


def test_forks_start_without_threads_and_with_their_own_random_numbers() -> None:
    code = (
        "import os, random, numpy\n"
        "print(len(os.listdir('/proc/self/task')), random.random(), numpy.random.rand())"
    )
    done = [forkserver.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in "ab"]
    threads, *numbers = zip(*map(str.split, done), strict=True)
    assert threads == ("1", "1")
    assert all(one != other for one, other in numbers)


def test_variables_read_at_start_up_get_an_interpreter_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "import sys; print('torch' in sys.modules, sys.flags.optimize)"]
    assert forkserver.run(command, capture_output=True, text=True).stdout == "True 0\n"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")  # as torch does on import
    assert forkserver.run(command, capture_output=True, text=True).stdout == "True 0\n"
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    assert forkserver.run(command, capture_output=True, text=True).stdout == "False 1\n"
    with_option = [command[0], "-B", *command[1:]]
    monkeypatch.delenv("PYTHONOPTIMIZE")
    assert forkserver.run(with_option, capture_output=True, text=True).stdout == "False 0\n"
