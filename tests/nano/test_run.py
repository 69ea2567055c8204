"""recipes/nano/run.sh: what it passes to which step, and how it ends. The steps have tests of their own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# In place of xverse: records its arguments, and sleeps if SLOW is set.
PROGRAM = """#!/bin/bash
echo "$@" >> "$RECORD"
if [[ -n ${SLOW:-} ]]; then echo $$ > "$RECORD.pid"; exec sleep 60; fi
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "recipes" / "nano").mkdir(parents=True)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("corpus", "sft"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / "recipes" / "nano" / "run.sh", tmp_path / "recipes" / "nano")
    for name in ("xverse", "python"):
        program = tmp_path / ".venv" / "bin" / name
        program.write_text(PROGRAM)
        program.chmod(0o755)
    return tmp_path


def command(checkout: Path, *more: str) -> list[str]:
    script = checkout / "recipes" / "nano" / "run.sh"
    return [
        "bash",
        str(script),
        str(checkout / "corpus"),
        str(checkout / "sft"),
        str(checkout / "out"),
        *more,
    ]


@pytest.mark.parametrize("missing", ["corpus", "sft"])
def test_inputs_are_checked_before_the_first_step(missing: str, checkout: Path) -> None:
    (checkout / missing).rmdir()
    environment = {**os.environ, "RECORD": str(checkout / "record")}
    done = subprocess.run(command(checkout), env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"run.sh: {checkout / missing}: no such file or folder\n"
    assert not (checkout / "record").exists()


def test_settings_reach_their_step(checkout: Path) -> None:
    record = checkout / "record"
    settings = [
        "mini",
        "data.vocab_size=600",
        "pretrain.train.steps=3",
        "sft.max_steps=2",
        "sft.identity={a: b}",
    ]
    environment = {**os.environ, "RECORD": str(record)}
    subprocess.run(command(checkout, *settings), env=environment, check=True, capture_output=True)
    data, pretrain, *written, sft = record.read_text().splitlines()
    assert data.startswith("data prepare recipes/nano/data.yaml corpus=")
    assert data.endswith(" vocab_size=600")
    assert " shape=mini " in pretrain
    assert pretrain.endswith(" train.steps=3")
    assert sft.endswith("/sft max_steps=2 identity={a: b}")
    for line, name in zip(written, ("skills", "persona", "instructions"), strict=True):
        file = checkout / "out" / "skills" / f"{name}.jsonl"
        assert line.startswith("-m recipes.skills --dialogues ")
        assert line.endswith(f" --out {file}")
        assert f".name={file}" in sft
    record.unlink()
    subprocess.run(command(checkout), env=environment, check=True, capture_output=True)
    assert " shape=nano " in record.read_text()
    for wrong in ("train.steps=3", "mixture={}", "large"):
        done = subprocess.run(command(checkout, wrong), env=environment, capture_output=True, text=True)
        assert done.returncode == 2
        assert f"run.sh: '{wrong}' is not STEP.key=value" in done.stderr


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_step_ends_with_the_script(checkout: Path, how: signal.Signals) -> None:
    if (
        how == signal.SIGKILL
        and subprocess.run(["setpriv", "--pdeathsig", "TERM", "true"], check=False).returncode
    ):
        pytest.skip("this system cannot end a process with its parent")
    record = checkout / "record"
    environment = {**os.environ, "RECORD": str(record), "SLOW": "1"}
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and bash cannot trap it then
    script = subprocess.Popen(command(checkout), env=environment, stderr=subprocess.PIPE)
    signal.signal(signal.SIGHUP, before)
    with script:
        pid = Path(f"{record}.pid")
        until = time.monotonic() + 60
        while not (pid.exists() and pid.read_text().strip()) and time.monotonic() < until:
            time.sleep(0.02)
        child = int(pid.read_text())
        script.send_signal(how)
        script.wait(60)
    until = time.monotonic() + 60
    while alive(child):
        assert time.monotonic() < until, "the step lives on"
        time.sleep(0.02)


def alive(process: int) -> bool:
    """Whether a process runs; not one that ended and that nobody has waited for."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True)
    return bool(state.stdout.strip()) and not state.stdout.startswith("Z")
