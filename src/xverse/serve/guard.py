"""What stands in front of every request: host names, keys, sizes, the access log."""

from __future__ import annotations

import hmac
import json
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException

from xverse.serve import errors

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# Of these the load balancer and Prometheus ask without a key; they say nothing of anybody's text.
OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})


class Guard:
    """Plain ASGI middleware, so that a stream passes through untouched.

    ``hosts`` that a request may name (None: any): a page that somebody else serves can make a browser ask
    127.0.0.1, under its own name. ``keys``: one of them has to come as a bearer token, where there are any.
    Bodies above ``max_body`` bytes are refused. The log has one JSON line for each request, without its
    contents.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        *,
        hosts: Sequence[str] | None,
        keys: Sequence[str],
        max_body: int,
        log: bool,
    ) -> None:
        self._app = app
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self._keys = [key.encode() for key in keys]
        self._max_body = max_body
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status, sent = time.monotonic(), 0, 0

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            sent += len(message.get("body", b""))
            await send(message)

        try:
            refused = self._refusal(scope)
            if refused is not None:
                await refused(scope, receive, counted)
            else:
                await self._app(scope, self._limited(scope, receive), counted)
        finally:
            if self._log:
                line = {
                    "time": round(time.time(), 3),
                    "client": (scope.get("client") or ("", 0))[0],
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "bytes": sent,
                    "seconds": round(time.monotonic() - begin, 3),
                }
                print(json.dumps(line), file=sys.stderr, flush=True)

    def _refusal(self, scope: Scope) -> Any:
        headers = {key.lower(): value for key, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self._hosts is not None and name.strip("[]") not in self._hosts:
            return errors.answer(421, f"this server does not answer to the host name '{name}'", code="host")
        if self._keys and scope["path"] not in OPEN_PATHS:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            fits = [hmac.compare_digest(given.strip(), key) for key in self._keys]  # all, in constant time
            if kind.lower() != b"bearer" or not any(fits):
                text = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
                return errors.answer(
                    401, text, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body:
            return errors.answer(
                413, f"the body is larger than {self._max_body} bytes", code="body_too_large"
            )
        return None

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        received = 0

        async def limited() -> MutableMapping[str, Any]:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body:  # sent in pieces, without saying how much
                raise HTTPException(413, f"the body is larger than {self._max_body} bytes")
            return message

        return limited
