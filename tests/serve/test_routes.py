"""What holds for every route of the application, whichever API it belongs to."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fastapi.routing import APIRoute

from xverse.serve.access_log import PROBES
from xverse.serve.app import InProcess
from xverse.serve.caller import URLS

QUESTION = [{"role": "user", "content": "What is your name?"}]
# A body that each route takes, with a name of its fields and a value that is wrong for it. The walk below
# fails for a route without an entry.
BODIES: dict[str, tuple[dict[str, Any], str, Any]] = {
    "/v1/chat/completions": ({"messages": QUESTION, "max_tokens": 1}, "max_tokens", "x"),
    "/v1/completions": ({"prompt": "x", "max_tokens": 1}, "max_tokens", "x"),
    "/v1/responses": ({"input": "x", "max_output_tokens": 1}, "max_output_tokens", "x"),
    "/v1/messages": ({"model": "nano", "messages": QUESTION, "max_tokens": 1}, "max_tokens", "x"),
    "/v1/messages/count_tokens": ({"model": "nano", "messages": QUESTION}, "system", 5),
    "/v1/embeddings": ({"input": "x"}, "input", 5),
    "/score": ({"text_1": "x", "text_2": "y"}, "text_1", 5),
    "/v1/score": ({"text_1": "x", "text_2": "y"}, "text_1", 5),
    "/rerank": ({"query": "x", "documents": ["y"]}, "documents", 5),
    "/v1/rerank": ({"query": "x", "documents": ["y"]}, "documents", 5),
    "/v2/rerank": ({"query": "x", "documents": ["y"]}, "documents", 5),
    "/tokenize": ({"prompt": "x"}, "prompt", 5),
    "/detokenize": ({"tokens": [5]}, "tokens", "x"),
    "/api/chat": ({"model": "nano", "messages": QUESTION, "options": {"num_predict": 1}}, "stream", "x"),
    "/api/generate": ({"model": "nano", "prompt": "x", "options": {"num_predict": 1}}, "stream", "x"),
    "/api/embed": ({"model": "nano", "input": "x"}, "input", 5),
    "/api/embeddings": ({"model": "nano", "prompt": "x"}, "prompt", 5),
    "/api/show": ({"model": "nano"}, "verbose", "x"),
}
WITHOUT_BODY = ("/v1/responses/{name}/cancel", "/api/pull", "/api/push", "/api/create", "/api/copy")
# These need a folder; test_adapters.py and test_batches.py have their fields and errors.
WITH_FOLDER = (
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
    *("/v1/files", "/v1/batches", "/v1/batches/{name}/cancel"),
)


@pytest.fixture
def guarded(launch: Any) -> Any:
    return launch({"keys": ["secret"], "max_body": 2000})


def routes(server: Any) -> list[tuple[str, str]]:
    """Method and path of every route that is in the OpenAPI document, probes aside."""
    app = server.server.config.app
    while not hasattr(app, "routes"):
        app = app._app
    found = [route for route in app.routes if isinstance(route, APIRoute) and route.include_in_schema]
    return [(method, route.path) for route in found for method in route.methods if route.path not in PROBES]


def message(path: str, answer: Any) -> str:
    """The message of an error in the API's own form."""
    body = answer.json()
    if path.startswith("/v1/messages"):
        assert set(body) == {"type", "error", "request_id"}
        assert body["type"] == "error"
        assert set(body["error"]) == {"type", "message"}
        return body["error"]["message"]
    if path.startswith("/api/"):
        assert set(body) == {"error"}
        return body["error"]
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]["message"]


def test_every_route_is_guarded_logged_and_measured(guarded: Any) -> None:
    found = routes(guarded)
    assert {path for method, path in found if method == "POST"} == {*BODIES, *WITHOUT_BODY, *WITH_FOLDER}
    with guarded.client() as http:
        for method, path in found:
            address = path.replace("{name}", "x").replace("{name:path}", "x")
            for headers, status, text in (
                ({}, 401, "API key"),
                ({"x-api-key": "wrong"}, 401, "API key"),
                ({"x-api-key": "secret", "host": "evil.example"}, 421, "evil.example"),
                ({"x-api-key": "secret", "origin": "https://evil.example"}, 403, "evil.example"),
            ):
                answer = http.request(method, address, headers=headers)
                assert answer.status_code == status, (method, path)
                if method != "HEAD":
                    assert text in message(path, answer)
                assert answer.headers["x-request-id"]
                assert answer.headers["x-content-type-options"] == "nosniff"
            if method == "POST":
                large = http.post(address, headers={"x-api-key": "secret"}, content=b" " * 3000)
                assert large.status_code == 413
                assert "2000 bytes" in message(path, large)


def test_every_route_answers_and_refuses_in_its_form(guarded: Any) -> None:
    with guarded.client(headers={"Authorization": "Bearer secret"}) as http:
        for path, (body, name, wrong) in BODIES.items():
            fine = http.post(path, json=body)
            assert fine.status_code == 200, (path, fine.text)
            refused = http.post(path, json={**body, name: wrong})
            assert refused.status_code == 400, path
            assert message(path, refused).startswith(f"{name}: must be ")
            broken = http.post(path, content=b"{", headers={"content-type": "application/json"})
            assert broken.status_code == 400
            assert "not valid JSON" in message(path, broken)
            other = http.post(path, json={**body, "model": "other"})
            assert other.status_code == 404, path
            assert "'other'" in message(path, other)
            typed = http.post(path, content=b"x", headers={"content-type": "text/plain"})
            assert typed.status_code == 415, path
            form = {"content-type": "application/x-www-form-urlencoded"}  # curl -d
            sent = http.post(path, content=json.dumps(body), headers=form)
            assert sent.status_code == (200 if path.startswith("/api/") else 415), path
            elsewhere = http.post(
                path, content=json.dumps(body), headers={**form, "origin": "http://other.org"}
            )
            assert elsewhere.status_code == 403, path
            measured = f'http_requests_total{{handler="{path}",method="POST",status="200"}}'
            assert measured in http.get("/metrics").text
        assert http.get("/api/none").json() == {"error": "/api/none does not exist"}


def test_every_route_keeps_the_time_limit_and_drains(launch: Any) -> None:
    """All that compute, that is."""
    server = launch(timeout=1e-4)
    computing = [path for path in BODIES if "okenize" not in path and "count" not in path]
    with server.client() as http:
        for path in computing:
            if path == "/api/show":
                continue
            body = {**BODIES[path][0], **({"stream": False} if path.startswith("/api/") else {})}
            if "embed" in path:  # one token takes less than the shortest limit
                body |= {name: "x " * 400 for name in ("input", "prompt") if name in body}
            late = http.post(path, json=body)
            assert late.status_code == 504, (path, late.text)
            assert "time limit" in message(path, late)
        server.service.runner.draining = True
        for path in computing:
            if path == "/api/show":
                continue
            refused = http.post(path, json=BODIES[path][0])
            assert refused.status_code == 503, path
            assert refused.headers["retry-after"]
            assert "shutting down" in message(path, refused)
        server.service.runner.draining = False


MANY = {  # requests of more parts than run at once
    "/v1/chat/completions": {"n": 16},
    "/v1/completions": {"n": 16},
    "/v1/embeddings": {"input": ["x"] * 30},
    "/v1/score": {"text_2": ["y"] * 30},
    "/v1/rerank": {"documents": ["y"] * 30},
    "/api/embed": {"input": ["x"] * 30},
}
STREAMING = [path for path in URLS if not any(kind in path for kind in ("embed", "score", "rerank"))]


def test_what_is_admitted_is_finished_during_shutdown(new_service: Any) -> None:
    """Streams whose head was sent, before their requests reach the engine, and parts that have not begun.
    No other request takes the room of those parts."""
    served = new_service(max_waiting=15)
    runner = served.runner

    async def stream(app: Any, path: str, body: dict[str, Any]) -> tuple[int, str]:
        status, sent = 0, b""
        left = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not left.is_set():
                left.set()
                return {"type": "http.request", "body": json.dumps(body).encode()}
            return await asyncio.Event().wait()  # type: ignore[return-value]

        async def send(message: Any) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status, runner.draining = message["status"], True
            sent += message.get("body", b"")

        head = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": head}
        scope |= {"query_string": b"", "root_path": "", "client": None, "server": None, "http_version": "1.1"}
        await app(scope, receive, send)
        return status, sent.decode()

    async def run() -> None:
        app = InProcess(served)
        async with app.running():
            for path in STREAMING:
                body = {**BODIES[path][0], "stream": True}
                status, text = await stream(app._api, path, body | ({"n": 16} if path in MANY else {}))
                assert (status, runner.open) == (200, 0)
                assert "error" not in text.replace('"error": null', ""), text
                runner.draining = False
            for path, more in MANY.items():
                reply = asyncio.create_task(app.call(path, BODIES[path][0] | more))
                while not runner.open and not reply.done():
                    await asyncio.sleep(0)
                assert runner.open == 8, path
                runner.draining = True
                status, _, answer = await reply
                assert status == 200, answer
                runner.draining = False
            body = {"prompt": "x", "max_tokens": 2000, "ignore_eos": True, "n": 16, "stream": True}
            first = asyncio.create_task(stream(app._api, "/v1/completions", body))
            while not runner.draining:  # its head was sent
                await asyncio.sleep(0)
            runner.draining = False
            status, _, answer = await app.call("/v1/completions", BODIES["/v1/completions"][0] | {"n": 9})
            assert (status, answer.get("error", {}).get("code")) == (429, "queue_full")
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)

    asyncio.run(run())
    assert not runner.open
    assert not runner.uses


def test_methods(server: Any) -> None:
    """HEAD is GET without a body; another method gets 405 with the ones that are allowed."""
    found = [*routes(server), *(("GET", path) for path in PROBES)]
    with server.client() as http:
        for path in sorted({path for _, path in found}):
            allowed = {method for method, each in found if each == path}
            address = path.replace("{name:path}", "nano").replace("{name}", "x")
            if "GET" in allowed:
                get, head = http.get(address), http.head(address)
                assert (head.status_code, head.content) == (get.status_code, b""), path
                assert head.headers["content-type"] == get.headers["content-type"]
                allowed |= {"HEAD"}
            for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "FOO"} - allowed:
                answer = http.request(method, address)
                assert answer.status_code == 405, (method, path)
                assert set(answer.headers["allow"].split(", ")) == allowed, (method, path)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("//v1/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/V1/Models", "/v1/models"),
        ("/health/", "/health"),
        ("/metrics//", "/metrics"),
        ("/api/tags/", "/api/tags"),
        ("/v1", None),
        ("/api/", None),
        ("/v1/chat", None),
        ("/nothing", None),
    ],
)
def test_paths_that_nearly_exist(server: Any, path: str, meant: str | None) -> None:
    with server.client() as http:
        for method in ("GET", "POST"):
            answer = http.request(method, server.url + path)
            assert answer.status_code == 404
            assert (f"use {meant}" in answer.text) if meant else ("; use" not in answer.text)


def test_compressed_bodies_are_refused_by_name(server: Any) -> None:
    with server.client() as http:
        for coding, status in (
            ("gzip", 415),
            ("br", 415),
            ("x, identity", 415),
            ("identity", 200),
            ("", 200),
        ):
            answer = http.post("/tokenize", json={"prompt": "x"}, headers={"Content-Encoding": coding})
            assert answer.status_code == status, coding
            assert status == 200 or f"content coding '{coding}'" in answer.text
