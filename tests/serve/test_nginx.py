"""Several replicas behind a real nginx, with the configuration from recipes/serve."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="needs nginx")
SHIPPED = Path(__file__).resolve().parents[2] / "recipes/serve/nginx.conf"
CHAT = "/v1/chat/completions"


@pytest.fixture
def replicas(launch: Any) -> list[Any]:
    # Replies without an end, so that the test controls which replica is busy.
    return [launch(page="chat", stop_ids=(), max_waiting=1) for _ in range(2)]


@pytest.fixture
def proxy(replicas: list[Any], tmp_path: Path) -> Iterator[str]:
    """The address of an nginx in front of both."""
    assert NGINX
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = SHIPPED.read_text(encoding="utf-8")
    for name, replica in zip(("36001", "36002"), replicas, strict=True):
        assert text.count(f"127.0.0.1:{name}") == 1
        text = text.replace(f"127.0.0.1:{name}", replica.url.removeprefix("http://"))
    text, count = re.subn(r"listen 8080;", f"listen 127.0.0.1:{port};", text)
    assert count == 1
    (tmp_path / "xverse.conf").write_text(text, encoding="utf-8")
    main = tmp_path / "nginx.conf"
    folders = "\n".join(
        f"{kind}_temp_path {tmp_path}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main.write_text(
        f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log; worker_processes 2;\n"
        f"events {{}}\nhttp {{ access_log off; {folders} include {tmp_path}/xverse.conf; }}\n",
        encoding="utf-8",
    )
    subprocess.run([NGINX, "-t", "-q", "-p", str(tmp_path), "-c", str(main)], check=True)
    process = subprocess.Popen([NGINX, "-p", str(tmp_path), "-c", str(main)])
    url = f"http://127.0.0.1:{port}"
    try:
        replicas[0].until(lambda: _answers(url))
        yield url
    finally:
        process.terminate()
        process.wait(10)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url + "/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def ask(url: str, tokens: int) -> Iterator[float]:
    """The arrival times of the pieces of a streamed reply."""
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": tokens, "stream": True}
    with (
        httpx.Client(trust_env=False, timeout=240) as client,
        client.stream("POST", url + CHAT, json=body) as answer,
    ):
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                assert "error" not in json.loads(line.removeprefix("data: "))
                yield time.monotonic()


def test_the_least_busy_replica_is_next(replicas: list[Any], proxy: str) -> None:
    streams = []
    for count in range(1, 7):
        stream = ask(proxy, 4000)
        next(stream)
        streams.append(stream)
        replicas[0].until(lambda count=count: sum(each.service.runner.open for each in replicas) == count)
        busy = [replica.service.runner.open for replica in replicas]
        assert max(busy) - min(busy) <= 1
    streams[0].close()  # the replica with fewer requests gets the next one
    streams[2].close()
    replicas[0].until(lambda: sum(each.service.runner.open for each in replicas) == 4)
    for _ in range(2):
        stream = ask(proxy, 4000)
        next(stream)
        streams.append(stream)
    replicas[0].until(lambda: [each.service.runner.open for each in replicas] == [3, 3])
    for stream in streams:
        stream.close()
    for replica in replicas:
        replica.until(replica.idle)  # a disconnect reaches the replica through nginx


def test_tokens_come_one_by_one(replicas: list[Any], proxy: str) -> None:
    times = list(ask(proxy, 300))
    assert len(times) > 100
    assert times[-1] - times[0] > 0.05
    middle = times[len(times) // 2] - times[0]
    assert 0.2 < middle / (times[-1] - times[0]) < 0.8  # buffered pieces would arrive together at the end


def test_a_replica_that_goes_is_not_missed(replicas: list[Any], proxy: str) -> None:
    failures: list[Exception] = []
    done = threading.Event()

    def keep_asking() -> None:
        while not done.is_set():
            try:
                list(ask(proxy, 20))
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=keep_asking) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    replicas[0].server.should_exit = True  # as on SIGTERM: finish running requests, accept no more
    time.sleep(1.5)
    done.set()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert replicas[1].service.runner.tokens > 0


def test_a_full_replica_passes_on(replicas: list[Any], proxy: str) -> None:
    """Direct clients fill the first one; on its 429 nginx tries the other."""
    own = [ask(replicas[0].url, 4000) for _ in range(9)]
    waiting = own.pop()
    for stream in own:
        next(stream)
    next(waiting)  # the first piece arrives before the engine has room
    for _ in range(4):
        assert len(list(ask(proxy, 5))) > 2
    for stream in (*own, waiting):
        stream.close()


def test_the_page_and_what_stays_inside(replicas: list[Any], proxy: str) -> None:
    with httpx.Client(base_url=proxy, trust_env=False) as client:
        assert "page/app.js" in client.get("/").text
        assert client.get("/metrics").status_code == 403
        answer = client.get("/v1/models", headers={"Host": "evil.example"})
        assert answer.status_code == 421


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_chats_through_it(launch: Any, proxy: str) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(proxy)
        page.wait_for_selector("[data-ready]")
        page.locator("#message").fill("Hello!")
        page.locator("#message").press("Enter")
        sync_api.expect(page.locator("article.assistant .content")).not_to_be_empty(timeout=20_000)
        browser.close()
