"""What an operator relies on: start-up, sockets, TLS, sub-paths, signals and the log."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import forkserver
from xverse.config import UserError
from xverse.serve.server import bind_unix

ROOT = Path(__file__).resolve().parents[2]
QUESTION = [{"role": "user", "content": "What is your name?"}]
CHAT = "/v1/chat/completions"
MAIN = "import sys; from xverse.cli import main; sys.exit(main())"
GATED = (  # loads its model when a file exists
    "import os, sys, time, xverse.serve.start as start\n"
    "load = start.load_service\n"
    "def wait(settings):\n"
    "    while not os.path.exists(os.environ['GATE']): time.sleep(0.05)\n"
    "    return load(settings)\n"
    "start.load_service = wait\n"
    "from xverse.cli import main; sys.exit(main())"
)
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def begin(
        *flags: str,
        code: str = MAIN,
        popen: type[subprocess.Popen[str]] = forkserver.Popen,
        **environment: str,
    ) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-c",
            code,
            "serve",
            "--threads",
            "1",
            "--max-cache-tokens",
            "9000",
            *flags,
        ]
        pipe = subprocess.PIPE
        env = {**os.environ, **environment}
        started.append(popen(command, stdout=pipe, stderr=pipe, text=True, env=env))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("serving nano at "), process.stderr and process.stderr.read()
    return line.split()[-1]


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """The exit code after SIGTERM, and the lines on stderr."""
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    return process.returncode, errors.splitlines()


def entries(lines: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines if line.startswith("{")]


def test_no_connection_before_the_model_is_loaded(start: Start, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--port", str(port), "--page", "none"]
    loading = start(*flags, code=GATED, GATE=str(tmp_path / "gate"))
    while _bindable(port):
        assert loading.poll() is None
        time.sleep(0.05)
    second = start(*flags)  # it learns at once that the address is in use
    assert second.wait(60) == 2
    assert "Address already in use" in second.stderr.read()  # type: ignore[union-attr]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
    (tmp_path / "gate").touch()
    answer = httpx.get(address(loading) + "/health", trust_env=False)
    assert (answer.status_code, answer.json()) == (200, {"status": "ready"})
    code, lines = ended(loading)
    assert code == 0
    text = "\n".join(lines)
    for part in ("model: nano, 11 million parameters, float32", "context: 8,192 tokens", "page: none"):
        assert part in text
    assert re.search(r"key-value cache: 9,000 tokens, \d+ MB, float32; at most \d+ MB of it keep", text)
    assert re.search(r"memory: \d+ MB now, about \d+ MB when the cache is full", text)
    again = start(*flags)  # closed connections do not block the address
    address(again)


def _bindable(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_tls_a_sub_path_and_keys_that_change(start: Start, tmp_path: Path) -> None:
    certificate, key, keys = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "keys"

    def make_certificate() -> None:
        command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
        command += " -subj /CN=localhost -addext subjectAltName=DNS:localhost"
        subprocess.run(
            [*command.split(), "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True
        )

    make_certificate()
    keys.write_text("# team\nfirst-key\n", encoding="utf-8")
    flags = ["--tls-cert", str(certificate), "--tls-key", str(key), "--api-key-file", str(keys)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # The health check reads the command line, which a fork does not have.
    options = ("--port", str(port), "--page", "none", "--root-path", "/xv/", *flags)
    process = start(*options, popen=subprocess.Popen)
    url = address(process).replace("127.0.0.1", "localhost")
    assert re.fullmatch(r"https://localhost:\d+/xv", url)

    def ask(path: str, sent: str) -> httpx.Response:
        trusted = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(verify=trusted, trust_env=False, timeout=60) as client:
            return client.get(url.removesuffix("/xv") + path, headers={"Authorization": f"Bearer {sent}"})

    health = [sys.executable, "-m", "xverse.commands.health", str(process.pid)]
    assert forkserver.run(health, timeout=60).returncode == 0  # on the container's port, over TLS
    for path in ("/xv/v1/models", "/v1/models"):  # a proxy keeps the sub-path or removes it
        assert ask(path, "first-key").json()["data"][0]["id"] == "nano"
        assert ask(path, "second-key").status_code == 401
    assert ask("/xv", "none").headers["location"] == "/xv/"
    assert ask("/xv/health", "none").status_code == ask("/health", "none").status_code == 200

    keys.write_text("second-key\n", encoding="utf-8")
    make_certificate()  # under the same names: a client that trusts the new one alone gets in
    process.send_signal(signal.SIGHUP)
    end = time.monotonic() + 20
    status = 0
    while status != 200 and time.monotonic() < end:
        try:
            status = ask("/v1/models", "second-key").status_code
        except httpx.ConnectError:  # still the former certificate
            time.sleep(0.05)
    assert status == 200
    assert ask("/v1/models", "first-key").status_code == 401
    keys.write_text("\n", encoding="utf-8")  # a mistake changes nothing
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert ask("/v1/models", "second-key").status_code == 200
    half = ssl.create_default_context(cafile=str(certificate)).wrap_socket(
        socket.create_connection(("127.0.0.1", port)), server_hostname="localhost"
    )
    half.sendall(b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n")  # and nothing more
    code, lines = ended(process)
    assert code == 0
    assert "unhandled" not in "".join(lines)
    assert any("keys and certificate were read again" in line for line in lines)
    assert any(
        "contains no key; write one key per line; the former ones stay in use" in line for line in lines
    )
    seen = {entry.get("key") for entry in entries(lines)}
    assert len(seen) == 3  # two keys' fingerprints, and none
    assert "first-key" not in "".join(lines)


def test_a_unix_socket(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "xverse.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))  # left behind by a server that was killed
    process = start("--uds", str(path), "--page", "none", popen=subprocess.Popen)  # for the health check
    assert address(process) == f"unix:{path}"
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=60) as client:
        sent = {"X-Forwarded-For": "203.0.113.9", "X-Request-Id": "abc-1"}
        answer = client.post(
            f"http://any.host{CHAT}", json={"messages": QUESTION, "max_tokens": 3}, headers=sent
        )
        assert answer.status_code == 200
        assert answer.headers["x-request-id"] == "abc-1"
    health = [sys.executable, "-m", "xverse.commands.health", str(process.pid)]
    assert forkserver.run(health, timeout=60).returncode == 0
    second = start("--uds", str(path), "--page", "none")
    assert second.wait(60) == 2
    assert "Address already in use" in second.stderr.read()  # type: ignore[union-attr]
    code, lines = ended(process)
    assert code == 0
    assert not path.exists()
    (entry,) = entries(lines)
    assert (entry["client"], entry["id"]) == ("203.0.113.9", "abc-1")


def test_sigterm_says_what_it_waits_for(start: Start) -> None:
    process = start("--port", "0", "--page", "none", "--timeout", "99")
    url = address(process)
    body = {"messages": QUESTION, "stream": True, "logit_bias": {"3": -100}, "max_tokens": 150}
    with (
        httpx.Client(base_url=url, trust_env=False, timeout=60) as client,
        client.stream("POST", CHAT, json=body) as answer,
    ):
        rest = answer.iter_lines()
        next(line for line in rest if line.startswith("data:") and '"role"' not in line)  # it runs
        process.send_signal(signal.SIGTERM)
        assert list(rest)[-2] == "data: [DONE]"
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "serve: waiting for 1 running reply, at most 99 s; Ctrl-C again ends at once" in errors


def logged(server: Any, capsys: pytest.CaptureFixture[str], count: int) -> list[dict[str, Any]]:
    """The log, whose lines are written after clients have their responses."""
    text = ""

    def complete() -> bool:
        nonlocal text
        text += capsys.readouterr().err
        return text.count("\n") >= count

    server.until(complete, 20)
    return entries(text.splitlines())


def test_the_log_has_what_an_operator_asks_for(launch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server = launch(guard={"keys": ["k"], "log": True})
    headers = {"Authorization": "Bearer k"}
    long = [{"role": "user", "content": "What is your name? " * 20}]
    with server.client(headers=headers) as client:
        for _ in range(2):
            client.post(CHAT, json={"messages": long, "max_tokens": 4})
        client.post(CHAT, json={"messages": QUESTION, "max_tokens": 0})
        client.post(CHAT, json={"messages": QUESTION}, headers={"Authorization": "Bearer wrong"})
        client.get("/health")
        client.get("/metrics")
        with client.stream("POST", CHAT, json={"messages": QUESTION, "stream": True}) as answer:
            next(answer.iter_lines())
    first, second, wrong, locked, cut = logged(server, capsys, 5)
    assert first["model"] == "nano"
    assert first["completion_tokens"] == 4
    assert first["cached_tokens"] == 0
    assert 0 < second["cached_tokens"] < second["prompt_tokens"] == first["prompt_tokens"]
    assert re.fullmatch("[0-9a-f]{8}", first["key"])
    assert (wrong["status"], wrong["state"]) == (400, "done")
    assert wrong["error"]
    assert (locked["status"], locked["error"]) == (401, "invalid_api_key")
    assert "key" not in locked
    assert (cut["status"], cut["state"]) == (200, "cut")
    assert cut["prompt_tokens"] > 0
    assert len({entry["id"] for entry in (first, second, wrong, locked, cut)}) == 5


def test_contents_are_readable(launch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server = launch(guard={"log": True, "contents": True})
    body = json.dumps({"messages": [{"role": "user", "content": "你好"}], "max_tokens": 4})  # in \u escapes
    with server.client() as client:
        client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
        client.post(CHAT, json={"messages": QUESTION, "max_tokens": 4, "stream": True})
    whole, streamed = logged(server, capsys, 2)
    assert whole["request"]["messages"][0]["content"] == "你好"
    assert whole["response"]["object"] == "chat.completion"
    assert "data: [DONE]" in streamed["response"]


def test_long_requests_are_logged_while_they_run(
    launch: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xverse.serve.access_log.LONG_SECONDS", 0.2)
    server = launch(guard={"log": True}, stop_ids=())
    with (
        server.client() as client,
        client.stream(
            "POST", CHAT, json={"messages": QUESTION, "stream": True, "max_tokens": 4000}
        ) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        server.until(lambda: '"running"' in capsys.readouterr().err, 20)


def test_assets_of_the_page_are_not_logged(launch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server = launch(page="chat", guard={"log": True})
    with server.client() as client:
        page = client.get("/").text
        for path in re.findall(r'(?:src|href)="\.?/?([\w./-]+\.(?:js|css|svg|ico|png|woff2?))"', page):
            client.get("/" + path)
        client.get("/no-such-file.js")
    paths = [entry["path"] for entry in logged(server, capsys, 2)]
    assert [path for path in paths if path != CHAT] == ["/", "/no-such-file.js"]  # other servers' aside


@pytest.mark.slow
def test_the_page_below_a_sub_path(launch: Any, visit: Any) -> None:
    server = launch(page="chat", guard={"root": "/xv"})
    visitor = visit(dataclasses.replace(server, url=server.url + "/xv"))
    visitor.say("What is your name?")
    assert "XVERSE-nano" in visitor.until_answered(1)
    assert all("/xv/" in url or url.endswith("/xv") for url in visitor.asked)


def test_a_device_that_fails_for_good_ends_the_server(launch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = launch()
    runner = server.service.runner
    died: list[bool] = []
    runner.on_death = lambda: died.append(True)

    def failing(text: str) -> Callable[[], Any]:
        def step() -> Any:
            raise RuntimeError(text)

        return step

    with server.client() as client:
        monkeypatch.setattr(runner.engine, "step", failing("a shape is wrong"))
        answer = client.post(CHAT, json={"messages": QUESTION})
        assert answer.status_code == 500  # the device still computes: only this step failed
        assert client.get("/health").status_code == 200
        text = "CUDA error: an illegal memory access was encountered"
        monkeypatch.setattr(runner.engine, "step", failing(text))
        assert client.post(CHAT, json={"messages": QUESTION}).status_code == 503
        assert client.get("/health").json() == {"status": "dead"}
        assert client.get("/health").status_code == client.head("/health/live").status_code == 503
    assert died == [True]


def test_draining_is_unhealthy(launch: Any) -> None:
    server = launch()
    with server.client() as client:
        assert client.head("/health").status_code == 200
        server.service.runner.draining = True
        answer = client.get("/health")
        assert (answer.status_code, answer.json()) == (503, {"status": "draining"})


def test_the_host_that_is_refused_gets_the_way_out(server: Any) -> None:
    with server.client() as client:
        answer = client.get("/v1/models", headers={"Host": "chat.example:80"})
    assert answer.status_code == 421
    assert answer.json()["error"]["message"] == (
        "the host name 'chat.example' is not allowed, only 127.0.0.1, ::1, localhost; "
        "--allowed-host chat.example adds it"
    )


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--allowed-host", "http://x.org"], "write x.org"),
        (["--allowed-host", "x.org:8080"], "write x.org"),
        (["--allowed-host", "x.org/path"], "write x.org"),
        (["--allowed-host", "a b"], "not a host name"),
        (["--trusted-proxy", "proxy.example"], "not an IP address"),
        (["--root-path", "xv"], "such as /xv"),
        (["--root-path", "/a/../b"], "such as /xv"),
        (["--allowed-origin", "https://x.org/path"], "without a path"),
        (["--tls-cert", "/nowhere"], "need each other"),
        (["--tls-cert", "/nowhere", "--tls-key", "/nowhere"], "not a readable file"),
        (["--uds", "x.sock"], "leave out --host and --port"),
        (["--api-key-file", "/"], "cannot be read"),
        (["--max-body-mb", "1e9"], "out of range"),
        (["--prefix-cache-mb", "-1"], "out of range"),
    ],
)
def test_wrong_flags_are_refused_before_loading(
    flags: list[str], part: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from xverse.cli import main

    monkeypatch.setattr("xverse.serve.start.load_service", lambda settings: pytest.fail("it was loaded"))
    try:
        code: Any = main(["serve", "--port", "0", *flags])
    except SystemExit as error:
        code = error.code
    assert code == 2
    printed = capsys.readouterr().err
    assert part in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "contains no key"),
        (b" \n\t\n# only a comment\n", "contains no key"),
        (b"good\ntwo words\n", "line 2: a key must be printable ASCII"),
        ("schlüssel\n".encode(), "line 1: a key must be printable ASCII"),
        (b"\xff\xfe", "not a text file in UTF-8"),
        (b"a\x00b\n", "line 1: a key must be printable ASCII"),
    ],
)
def test_key_files(content: bytes, part: str, tmp_path: Path) -> None:
    from xverse.config import UserError
    from xverse.serve.keys import read_keys

    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(part)):
        read_keys(str(file))
    file.write_bytes(b"\xef\xbb\xbfone\r\n\n# two\n three \n")
    assert read_keys(str(file))[:2] == ["one", "three"]


def test_a_path_that_is_not_a_socket_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for path, part in (
        (file, "not a socket"),
        (tmp_path, "not a socket"),
        (tmp_path / "a" / "b", "No such file"),
    ):
        with pytest.raises(UserError, match=part):
            bind_unix(path)
    assert file.read_text() == "kept"
