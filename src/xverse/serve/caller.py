"""Calls of an application's routes without a socket, with the same checks and errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from xverse.serve.access_log import AccessLog, Receive, Scope, Send, current
from xverse.serve.batch_file import Answer
from xverse.serve.metrics import Metrics

# Endpoints for batches: those that answer a JSON body with another one.
URLS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"),
    *("/v1/score", "/v1/rerank", "/api/chat", "/api/generate", "/api/embed"),
)


class Caller:
    """Calls the routes of an application."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], metrics: Metrics) -> None:
        self._app = app
        self._logged = AccessLog(self._keyed, metrics, log=False)

    async def _keyed(self, scope: Scope, receive: Receive, send: Send) -> None:
        current().key = scope["key"]
        await self._app(scope, receive, send)

    async def call(self, path: str, body: dict[str, Any], key: str | None = None) -> Answer:
        """POST ``body``. Cancelling it is the client's leaving. ``key``: the fingerprint of the API key whose
        request it is, to which stored responses belong."""
        sent = asyncio.Queue[MutableMapping[str, Any]]()
        sent.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        status, request_id, received = 500, "", bytearray()

        async def send(message: MutableMapping[str, Any]) -> None:
            nonlocal status, request_id
            if message["type"] == "http.response.start":
                status = message["status"]
                names = dict(message["headers"])
                request_id = names.get(b"x-request-id", b"").decode("latin-1")
            received.extend(message.get("body", b""))

        scope = {
            "type": "http",
            "key": key,
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
            "client": None,
            "server": ("localhost", 0),
        }
        await self._logged(scope, sent.get, send)
        return status, request_id, json.loads(received or b"null")
