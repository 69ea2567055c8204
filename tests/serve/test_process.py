"""The server as a process: signals, death of the engine, wrong flags."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import httpx
import pytest

from tests import forkserver

QUESTION = [{"role": "user", "content": "What is your name?"}]
CHAT = "/v1/chat/completions"
COMMAND = [sys.executable, "-c", "import sys; from xverse.cli import main; sys.exit(main())", "serve"]


@pytest.fixture
def process(tmp_path: Any) -> Any:
    """``xverse serve`` as users start it."""
    flags = ["--port", "0", "--threads", "1", "--max-cache-tokens", "9000"]
    started = forkserver.Popen(
        [*COMMAND, *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "XVERSE_API_KEY": "k"},
    )  # fmt: skip
    assert started.stdout is not None
    line = started.stdout.readline()
    assert line.startswith("serving nano at http://127.0.0.1:"), started.stderr.read()  # type: ignore[union-attr]
    yield started, line.split()[-1]
    started.kill()
    started.wait()


def test_sigterm_lets_replies_finish_and_takes_no_new_ones(process: Any) -> None:
    running, url = process
    headers = {"Authorization": "Bearer k"}
    body = {"messages": QUESTION, "stream": True, "logit_bias": {"3": -100}, "max_tokens": 200}
    with (
        httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=240) as client,
        client.stream("POST", CHAT, json=body) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        running.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/health", trust_env=False)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert sum('"content"' in line for line in rest) > 50
    assert running.wait(20) == 0
    log = [json.loads(line) for line in running.stderr.read().splitlines() if line.startswith("{")]
    assert [entry["path"] for entry in log] == [CHAT]
    assert "name" not in json.dumps(log)  # no contents


def test_an_engine_that_dies_takes_the_process_with_it(tmp_path: Any) -> None:
    code = (
        "import sys, xverse.serve.runner as runner\n"
        "runner.Engine.step = lambda self: sys.exit(9)\n"
        "from xverse.cli import main\n"
        "sys.exit(main(['serve', '--port', '0', '--threads', '1']))\n"
    )
    started = forkserver.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert started.stdout is not None
        url = started.stdout.readline().split()[-1]
        with contextlib.suppress(httpx.TransportError):  # the process may have exited
            answer = httpx.post(url + CHAT, json={"messages": QUESTION}, trust_env=False)
            assert answer.status_code == 503
        assert started.wait(20) == 1
        assert "the engine died" in started.stderr.read()  # type: ignore[union-attr]
    finally:
        started.kill()
        started.wait()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--port", "99999"], "port"),
        (["--timeout", "0"], "--timeout"),
        (["--api-key-file", "/nowhere"], "--api-key-file"),
        (["--max-batch", "0"], "--max-batch"),
        (["--host", "256.1.1.1"], "256.1.1.1"),
        (["--allowed-origin", "friend.example"], "not an origin"),
        (["--port", "0", "--tokenizer", "/nowhere"], "/nowhere"),
        (["--log-contents", "--no-access-log"], "not allowed with"),
    ],
)
def test_wrong_flags(arguments: list[str], part: str) -> None:
    done = forkserver.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_origins_that_are_allowed() -> None:
    """As a browser does it: first a preflight request, without a key."""
    flags = ["--port", "0", "--threads", "1", "--page", "none", "--allowed-origin", "https://friend.example"]
    environment = {**os.environ, "XVERSE_API_KEY": "k"}
    started = forkserver.Popen([*COMMAND, *flags], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert started.stdout is not None
        url = started.stdout.readline().split()[-1]
        with httpx.Client(base_url=url, trust_env=False, timeout=240) as client:
            for origin, welcome in (("https://friend.example", True), ("https://evil.example", False)):
                asks = {"Origin": origin, "Access-Control-Request-Method": "POST"}
                asks["Access-Control-Request-Headers"] = "authorization, content-type"
                answer = client.options(CHAT, headers=asks)
                assert (answer.headers.get("access-control-allow-origin") == origin) == welcome
                sent = {"Origin": origin, "Authorization": "Bearer k"}
                answer = client.post(CHAT, json={"messages": QUESTION, "max_tokens": 3}, headers=sent)
                assert answer.status_code == (200 if welcome else 403)
                assert (answer.headers.get("access-control-allow-origin") == origin) == welcome
            assert client.get("/").status_code == 401  # --page none: the 404 is not revealed without a key
            assert client.get("/", headers={"Authorization": "Bearer k"}).status_code == 404
    finally:
        started.terminate()
        assert started.wait(20) == 0
