"""``python -m xverse.cli chat`` as users run it: by pipe, with --ask and --complete, and in a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import forkserver
from tests.scale import ALL
from xverse.cli import main

from .reciter import RECITED

COMMAND = [sys.executable, "-m", "xverse.cli", "chat"]
ON_A_TERMINAL = (
    "import fcntl, signal, sys, termios\n"
    "from xverse.cli import main\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # pytest's parallel workers ignore it
    "sys.exit(main())"
)
PROMPT = "\x1b[?25h"  # show cursor: prompt_toolkit has drawn its prompt and reads input


def chat(
    *arguments: str | Path, stdin: str | None = None, python: tuple[str, ...] = ()
) -> tuple[int, str, str]:
    result = forkserver.run(
        [sys.executable, *python, "-m", "xverse.cli", "chat", *map(str, arguments)],
        input=None if stdin is None else stdin.encode(),
        capture_output=True,
        timeout=300,
    )
    return result.returncode, result.stdout.decode(), result.stderr.decode()


def test_ask_prints_only_the_reply_and_imports_no_transformers(reciting_model: Path) -> None:
    code, out, err = chat("--model", reciting_model, "--ask", "你好", python=("-X", "importtime"))
    assert (code, out) == (0, RECITED + "\n")
    modules = {line.rpartition("|")[2].strip() for line in err.splitlines()}
    assert "torch" in modules
    assert not {"transformers", "accelerate", "huggingface_hub", "prompt_toolkit", "jinja2"} & modules


def test_complete_prints_only_the_continuation(reciting_model: Path) -> None:
    code, out, err = chat("--model", reciting_model, "--complete", "Say", "--greedy")
    assert (code, out, err) == (0, RECITED + "\n", "")


def test_a_pipe_has_replies_and_nothing_else(reciting_model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    lines = ["你好 👋", "/rest", "שלום", f"/save {saved}"]
    code, out, err = chat("--model", reciting_model, stdin="\r\n".join(lines))
    assert out == 2 * (RECITED + "\n")
    assert "did you mean '/reset'" in err
    assert code == 2  # one line was refused
    messages = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert [message["content"] for message in messages] == [lines[0], RECITED, lines[2], RECITED]


def test_ask_reads_one_prompt_of_several_lines_from_stdin(reciting_model: Path) -> None:
    code, out, err = chat("--model", reciting_model, "--ask", "-", stdin="第一行\n/help\n\nlast\n")
    assert (code, out, err) == (0, RECITED + "\n", "")
    code, out, err = chat("--model", reciting_model, "--complete", "-", "--greedy", stdin="Say\n")
    assert (code, out, err) == (0, RECITED + "\n", "")
    assert chat("--ask", "-", stdin="\n") == (2, "", "xverse: --ask: the text is empty\n")


@pytest.mark.parametrize("closed", [">&-", *(["<&- >&-", "2>&-", "<&-"] if ALL else [])])
def test_closed_streams(reciting_model: Path, closed: str) -> None:
    command = " ".join([*COMMAND, "--model", f"'{reciting_model}'", "--ask", "hello", closed])
    result = subprocess.run(["sh", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode() == ("" if ">&-" in closed.replace("2>&-", "") else RECITED + "\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ask", "\udcff"], "not valid UTF-8"),
        (["--ask", "x", "--greedy", "--temperature", "1"], "mutually exclusive"),
        (["--complete", "x", "--system", "y"], "takes no --system"),
    ],
)
def test_mistakes_are_one_clear_line(
    reciting_model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["chat", "--model", str(reciting_model), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ask", "x", "--complete", "y"], "not allowed with"),
        (["--max-new-token", "5"], "did you mean '--max-new-tokens'"),
        (["--seed", "x"], "argument --seed: 'x' is not a whole number"),
        (["--seed", "-3"], "argument --seed: -3 is out of range"),
        (["--temperature", "x"], "argument --temperature: 'x' is not a number"),
        (["--temperature", "-1"], "argument --temperature: -1.0 is out of range"),
        (["--max-new-tokens", "0"], "argument --max-new-tokens: 0 is out of range"),
        (["--ask", ""], "--ask: the value is empty"),
        (["--complete", " "], "--complete: the value is empty"),
        (["--ask", "x", "--top-p", "nan"], "argument --top-p"),
        (["--ask", "x", "--threads", "0"], "argument --threads: 0 is out of range"),
    ],
)
def test_flags_that_argparse_refuses(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["chat", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


class Screen:
    """``xverse chat`` in a pseudo-terminal."""

    def __init__(self, *arguments: str | Path, environment: dict[str, str] | None = None) -> None:
        self.fd, child = pty.openpty()
        self.output = b""
        self.process = forkserver.Popen(
            [sys.executable, "-c", ON_A_TERMINAL, "chat", *map(str, arguments)],
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "LC_ALL": "C.UTF-8"}
            | (environment or {}),
        )
        os.close(child)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, text: str, timeout: float = 60) -> str:
        """Read until ``text`` appears; returns and discards the output up to and including it."""
        deadline = time.monotonic() + timeout
        wanted = text.encode()
        while wanted not in self.output:
            assert time.monotonic() < deadline, (
                f"{text!r} did not come; got {self.output.decode('utf-8', 'replace')}"
            )
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    self.output += os.read(self.fd, 65536)
                except OSError:  # the other end is closed
                    assert wanted in self.output, self.output.decode("utf-8", "replace")
        before, _, self.output = self.output.partition(wanted)
        return (before + wanted).decode("utf-8", "replace")


@contextlib.contextmanager
def screen(*arguments: str | Path, environment: dict[str, str] | None = None) -> Iterator[Screen]:
    running = Screen(*arguments, environment=environment)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()
        os.close(running.fd)


def test_ctrl_c_stops_the_reply_and_keeps_the_conversation(endless_model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    arguments = ["--model", endless_model, "--threads", "1", "--no-history"]
    with screen(*arguments) as terminal:
        terminal.wait_for("Ctrl-D leaves")
        terminal.wait_for(PROMPT)
        terminal.type("\x03")  # at the prompt it only explains how to leave
        terminal.wait_for("/exit leaves")
        terminal.wait_for(PROMPT)
        terminal.type("你好\r")
        terminal.wait_for(RECITED)
        terminal.type("\x03")
        assert "limit" not in terminal.wait_for("stopped; the reply so far is kept")
        terminal.wait_for(PROMPT)
        terminal.type(f"/save {saved}\r")
        terminal.wait_for("2 messages saved")
        terminal.wait_for(PROMPT)
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0
    question, answer = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert question == {"role": "user", "content": "你好"}
    assert answer["content"].startswith(RECITED)
    assert answer["content"] in 2000 * RECITED


def test_history_is_kept_across_sessions_for_its_owner_only(reciting_model: Path, tmp_path: Path) -> None:
    environment = {"XDG_STATE_HOME": str(tmp_path / "state")}
    history = tmp_path / "state" / "xverse" / "history"
    arguments = ["--model", reciting_model, "--threads", "1"]
    with screen(*arguments, environment=environment) as terminal:
        shown = terminal.wait_for("/help lists")
        assert "parameters, a context of 400 tokens" in shown
        terminal.wait_for(PROMPT)
        terminal.type("你好 secret\r")
        terminal.wait_for("tok/s")
        terminal.wait_for(PROMPT)
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0
    assert history.stat().st_mode & 0o777 == 0o600
    assert "+你好 secret" in history.read_text(encoding="utf-8")
    before = history.read_bytes()
    for more, kept in ([["--no-history"], True], [[], False]):  # the arrow key brings it back, or nothing
        with screen(*arguments, *more, environment=environment) as terminal:
            terminal.wait_for(PROMPT)
            terminal.type("\x1b[A\r")
            if kept:
                terminal.type("/help\r")
            shown = terminal.wait_for("send the text of a file" if kept else "tok/s")
            assert ("secret" in shown) != kept
    assert before == history.read_bytes()[: len(before)]
    size = history.stat().st_size
    assert forkserver.run(
        [*COMMAND, "--model", str(reciting_model)],
        input=b"piped",
        capture_output=True,
        env={**os.environ, **environment},
        timeout=300,
    ).stdout
    assert history.stat().st_size == size
