"""The demos with the flags of XVERSE-7B's README, in separate processes."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import forkserver
from xverse.formats import resolve

pytest.importorskip("fastapi")
ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium")


@pytest.fixture
def demo() -> Iterator[Any]:
    """``demo("chat_demo.py", flags)``: the process and its address."""
    started: list[subprocess.Popen[str]] = []

    def start(name: str, *flags: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, str(ROOT / name), "--port=0", *flags]
        process = forkserver.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http://127.0.0.1:" in line, process.stderr.read() if process.stderr else ""
        return process, line.split()[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(
    ("name", "tab", "more"),
    [("chat_demo.py", "#chat", []), ("text_generation_demo.py", "#text", ["--quantize", "int8"])],
)
def test_it_opens_its_tab_and_ends_with_a_visitor(demo: Any, name: str, tab: str, more: list[str]) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    nano = str(resolve("nano"))
    process, url = demo(name, f"--model_path={nano}", f"--tokenizer_path={nano}", *more)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(url)
        sync_api.expect(page.locator(tab)).to_be_visible(timeout=90_000)
        page.wait_for_selector("[data-ready]")
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)  # an open window must not delay the exit
        assert process.wait(30) == 0
        assert time.monotonic() - begin < 10
        browser.close()


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--prot=1"], "--prot"),
        (["--model_path=/nowhere"], "/nowhere"),
        (["--tokenizer_path=/nowhere"], "/nowhere"),
        (["--port=port"], "'port' is not a whole number"),
        (["--quantize=int3"], "int3"),
    ],
)
@pytest.mark.parametrize("name", ["chat_demo.py", "text_generation_demo.py"])
def test_wrong_flags(name: str, flags: list[str], part: str) -> None:
    done = forkserver.run(
        [sys.executable, str(ROOT / name), *flags], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 2
    assert part in done.stderr
    assert "Traceback" not in done.stderr
