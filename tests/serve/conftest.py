"""A real server on a real socket, in a thread so that tests can inspect its engine, and a real browser
(Debian's chromium)."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

DESK = {"width": 1280, "height": 800}


@dataclass
class Running:
    url: str
    service: Any
    server: Any

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=240, trust_env=False, **options)

    def openai(self, key: str = "none") -> Any:
        import openai

        http = httpx.Client(trust_env=False)
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, http_client=http)

    def until(self, condition: Any, seconds: float = 90) -> None:
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

    from xverse.commands.serve import LOOPBACK
    from xverse.serve.access_log import AccessLog
    from xverse.serve.app import create_app
    from xverse.serve.connections import protocol
    from xverse.serve.guard import Guard
    from xverse.serve.server import bind

    log = {name: guard.pop(name) for name in ("log", "contents", "root") if name in guard}
    settings = {"hosts": LOOPBACK, "keys": (), "max_body": 1_000_000, **guard}
    listener = bind("127.0.0.1", 0)
    checked = Guard(create_app(service, page), **settings)
    app = AccessLog(checked, service.metrics, **{"log": False, **log})
    config = uvicorn.Config(app, log_level="error", http=protocol())
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


@pytest.fixture(scope="session")
def vocabulary(nano: Any) -> Any:
    """As the grammars' process has it."""
    from xverse.serve.grammar_worker import Vocabulary

    return Vocabulary(nano.engine.tokenizer, nano.stop_ids)


def make_service(loaded: Any, **settings: Any) -> Any:
    from xverse.engine import Engine
    from xverse.serve.batches import Batches
    from xverse.serve.caller import URLS
    from xverse.serve.grammar import Grammars
    from xverse.serve.metrics import Metrics
    from xverse.serve.runner import EngineRunner
    from xverse.serve.service import Service

    engine = loaded.engine
    fresh = Engine(engine.model, engine.tokenizer, max_batch=8, max_cache_tokens=20_000)
    runner = EngineRunner(fresh, max_waiting=settings.pop("max_waiting", 32))
    if "batch_folder" in settings:
        settings["batches"] = Batches(settings.pop("batch_folder"), URLS)
    return Service(
        runner=runner,
        tokenizer=engine.tokenizer,
        name="nano",
        sampling=settings.pop("sampling", loaded.sampling),
        stop_ids=settings.pop("stop_ids", loaded.stop_ids),
        grammars=Grammars(engine.tokenizer, loaded.stop_ids),
        metrics=Metrics(runner, "nano"),
        **settings,
    )


@pytest.fixture
def new_service(nano: Any) -> Any:
    """``new_service(settings)``: a service that no server runs yet."""
    return lambda **settings: make_service(nano, **settings)


@pytest.fixture(scope="session")
def server(nano: Any) -> Iterator[Running]:
    """Shared by tests that do not change it."""
    running = start(make_service(nano))
    yield running
    running.server.should_exit = True


@pytest.fixture(scope="session")
def site(nano: Any) -> Iterator[Running]:
    """The same with the web page; short replies, always the most probable ones."""
    short = dataclasses.replace(nano.sampling, temperature=0.0, max_new_tokens=60)
    running = start(make_service(nano, sampling=short), "chat")
    yield running
    running.server.should_exit = True


@pytest.fixture
def launch(nano: Any) -> Iterator[Any]:
    """``launch(service settings, guard={…}, page=…)``: a server for one test."""
    started: list[Running] = []

    def make(guard: dict[str, Any] | None = None, page: str | None = None, **settings: Any) -> Running:
        started.append(start(make_service(nano, **settings), page, **(guard or {})))
        return started[-1]

    yield make
    for running in started:
        running.server.should_exit = True


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("needs chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@dataclass
class Visitor:
    """One browser window, and every URL that it requested."""

    page: Any
    asked: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.page.locator("#message").fill(text)
        self.page.locator("#message").press("Enter")

    def said(self, who: str) -> list[str]:
        """The texts of one role, ``user`` or ``assistant``."""
        return [each.strip() for each in self.page.locator(f"article.{who} .content").all_text_contents()]

    def until_answered(self, replies: int) -> str:
        """Wait for that many replies; return the last one when it is complete."""
        from playwright import sync_api

        sync_api.expect(self.page.locator("article.assistant")).to_have_count(replies, timeout=90_000)
        sync_api.expect(self.page.locator("#send")).to_be_visible(timeout=90_000)
        return self.said("assistant")[-1]

    def until_telling(self, server: Any, replies: int = 1) -> str:
        """Wait for that many replies; return the text so far of the last one, which continues."""

        def begun() -> bool:
            said = self.said("assistant")
            return len(said) == replies and len(said[-1]) > 20

        server.until(begun)
        return self.said("assistant")[-1]

    def end(self) -> None:
        """End the running reply."""
        self.page.locator("#stop").dispatch_event("click")

    def conversations(self) -> list[str]:
        return self.page.locator("#conversations .open").all_text_contents()

    def choose(self, action: str, conversation: int = 0) -> None:
        """An entry of a conversation's menu."""
        self.page.locator("#conversations li > .icon").nth(conversation).click()
        self.page.locator(".menu button", has_text=action).click()

    def load(self, messages: list[tuple[str, str]]) -> None:
        """Import a conversation and open it."""
        value = [{"role": role, "content": content} for role, content in messages]
        with self.page.expect_file_chooser() as chooser:
            self.page.locator("#import").click()
        file = {"name": "c.json", "mimeType": "application/json", "buffer": json.dumps(value).encode()}
        chooser.value.set_files([file])
        self.page.locator("#conversations .open").first.click()

    def picture(self, name: str) -> None:
        if os.environ.get("XVERSE_SCREENSHOTS"):
            self.page.set_viewport_size({"width": 1280, "height": 680})
            self.page.screenshot(path=Path(os.environ["XVERSE_SCREENSHOTS"]) / f"{name}.png")


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visitor]]:
    """``visit(server)``: its page in a new browser context. At the end, no other host was contacted."""
    visitors: list[Visitor] = []
    contexts: list[Any] = []

    def open_page(
        server: Any, *, locale: str = "en-US", size: dict[str, int] = DESK, script: str = "", **more: Any
    ) -> Visitor:
        context = browser.new_context(locale=locale, viewport=size, **more)
        context.add_init_script(script)
        context.set_default_timeout(90_000)
        contexts.append(context)
        return enter(context, server)

    def enter(context: Any, server: Any) -> Visitor:
        page = context.new_page()
        visitor = Visitor(page)
        page.on("request", lambda request: visitor.asked.append(request.url))
        page.on("pageerror", lambda error: visitor.errors.append(str(error)))
        page.goto(server.url)
        page.wait_for_selector("[data-ready]")
        visitors.append(visitor)
        return visitor

    open_page.again = lambda visitor, server: enter(visitor.page.context, server)  # type: ignore[attr-defined]
    yield open_page
    for context in contexts:
        context.close()
    for visitor in visitors:
        assert visitor.asked
        hosts = {urlsplit(url).hostname for url in visitor.asked if not url.startswith(("data:", "blob:"))}
        assert hosts == {"127.0.0.1"}
        assert not visitor.errors


@pytest.fixture
def storyteller(nano: Any, launch: Any) -> Any:
    """A server whose replies continue until they are ended, at the speed of a large model."""
    endless = dataclasses.replace(nano.sampling, max_new_tokens=8000)
    server = launch(page="chat", stop_ids=(), sampling=endless)
    engine = server.service.runner.engine
    step = engine.step

    def slow_step() -> Any:
        time.sleep(0.02)
        return step()

    engine.step = slow_step
    return server
