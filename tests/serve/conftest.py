"""A real server on a real socket, in a thread of the test's process: its engine can be looked into."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")


@dataclass
class Running:
    url: str
    service: Any
    server: Any

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **options)

    def openai(self, key: str = "none") -> Any:
        import openai

        http = httpx.Client(trust_env=False)
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, http_client=http)

    def until(self, condition: Any, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.01)

    def idle(self) -> bool:
        stats = self.service.runner.stats
        blocks = stats.free_blocks + stats.cached_blocks
        return not stats.running and not stats.waiting and blocks == stats.blocks


def start(service: Any, page: str | None = None, **guard: Any) -> Running:
    import uvicorn

    from xverse.commands.serve import LOOPBACK, listen
    from xverse.serve.app import create_app
    from xverse.serve.guard import Guard

    settings = {"hosts": LOOPBACK, "keys": (), "max_body": 1_000_000, "log": False, **guard}
    listener = listen("127.0.0.1", 0)
    config = uvicorn.Config(Guard(create_app(service, page), **settings), log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    running = Running(f"http://127.0.0.1:{listener.getsockname()[1]}", service, server)
    running.until(lambda: server.started)
    return running


@pytest.fixture(scope="session")
def nano() -> Any:
    from xverse.engine.load import load_engine

    return load_engine("nano", threads=1, max_batch=8, max_cache_tokens=20_000)


def make_service(loaded: Any, **settings: Any) -> Any:
    from xverse.engine import Engine
    from xverse.serve.grammar import Grammars
    from xverse.serve.metrics import Metrics
    from xverse.serve.runner import EngineRunner
    from xverse.serve.service import Service

    engine = loaded.engine
    fresh = Engine(engine.model, engine.tokenizer, max_batch=8, max_cache_tokens=20_000)
    runner = EngineRunner(fresh, max_waiting=settings.pop("max_waiting", 32))
    return Service(
        runner=runner,
        tokenizer=engine.tokenizer,
        name="nano",
        parameters=settings.pop("parameters", loaded.parameters),
        stop_ids=settings.pop("stop_ids", loaded.stop_ids),
        grammars=Grammars(engine.tokenizer, loaded.stop_ids),
        metrics=Metrics(runner),
        **settings,
    )


@pytest.fixture(scope="session")
def server(nano: Any) -> Iterator[Running]:
    """One for all tests that leave it as it was."""
    running = start(make_service(nano))
    yield running
    running.server.should_exit = True


@pytest.fixture(scope="session")
def site(nano: Any) -> Iterator[Running]:
    """The same with the web page."""
    running = start(make_service(nano), "chat")
    yield running
    running.server.should_exit = True


@pytest.fixture
def launch(nano: Any) -> Iterator[Any]:
    """``launch(service settings, guard={…}, page=…)``: a server of the test's own."""
    started: list[Running] = []

    def make(guard: dict[str, Any] | None = None, page: str | None = None, **settings: Any) -> Running:
        started.append(start(make_service(nano, **settings), page, **(guard or {})))
        return started[-1]

    yield make
    for running in started:
        running.server.should_exit = True
