"""What stands in front of every request: host names, keys, sizes, the access log."""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import sys
import time
import urllib.parse
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException

from xverse.serve import errors

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# Of these the load balancer and Prometheus ask without a key; they say nothing of anybody's text.
OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})

# What a model writes becomes part of a page. It may not make the browser fetch from elsewhere (an image's
# address can carry a conversation away), and nobody may put the page into a frame of his own.
_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
        b"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        b"worker-src 'self' blob:; form-action 'self'; base-uri 'self'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    """Plain ASGI middleware, so that a stream passes through untouched.

    ``hosts`` that a request may name (None: any): a page that somebody else serves can make a browser ask
    127.0.0.1, under its own name. What such a page asks names its origin too; ``origins`` are welcome all the
    same. ``keys``: where there are any, one of them has to come as a bearer token, or as the password that a
    browser asks its user for. Bodies above ``max_body`` bytes are refused. The log has one JSON line for each
    request; with ``contents``, what was asked and answered at ``/v1/`` stands in it too.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        *,
        hosts: Sequence[str] | None,
        keys: Sequence[str],
        max_body: int,
        log: bool,
        origins: Sequence[str] = (),
        contents: bool = False,
    ) -> None:
        self._app = app
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self._keys = [key.encode() for key in keys]
        self._max_body = max_body
        self._log = log
        self._origins = frozenset(origins)
        self._contents = contents

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # nothing here speaks it, and nothing below would check it
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status, sent = time.monotonic(), 0, 0
        keep = self._log and self._contents and scope["path"].startswith("/v1/")
        asked, answered = bytearray(), bytearray()

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
            sent += len(message.get("body", b""))
            if keep:
                answered.extend(message.get("body", b""))
            await send(message)

        try:
            refused = self._refusal(scope)
            if refused is not None:
                await refused(scope, receive, counted)
            else:
                await self._app(scope, self._limited(receive, asked if keep else None), counted)
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
                if keep:
                    line["request"] = asked.decode("utf-8", errors="replace")
                    line["response"] = answered.decode("utf-8", errors="replace")
                print(json.dumps(line), file=sys.stderr, flush=True)

    def _refusal(self, scope: Scope) -> Any:
        headers = {key.lower(): value for key, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = (host.rsplit(":", 1)[0] if not host.endswith("]") else host).strip("[]")
        if self._hosts is not None and name not in self._hosts:
            return errors.answer(421, f"this server does not answer to the host name '{name}'", code="host")
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and origin not in self._origins and not self._own(origin, name):
            return errors.answer(403, f"pages of '{origin}' may not ask this server", code="origin")
        if self._keys and scope["path"] not in OPEN_PATHS:
            given = _given_key(headers.get(b"authorization", b""))
            fits = [hmac.compare_digest(given, key) for key in self._keys]  # all, in constant time
            if not any(fits):
                text = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
                kind = "Bearer" if scope["path"].startswith("/v1/") else 'Basic realm="API key as password"'
                return errors.answer(401, text, code="invalid_api_key", headers={"WWW-Authenticate": kind})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body:
            return errors.answer(
                413, f"the body is larger than {self._max_body} bytes", code="body_too_large"
            )
        return None

    def _own(self, origin: str, host: str) -> bool:
        name = urllib.parse.urlsplit(origin).hostname or ""
        return name == host or (self._hosts is not None and name in self._hosts)

    def _limited(self, receive: Receive, copy: bytearray | None) -> Receive:
        received = 0

        async def limited() -> MutableMapping[str, Any]:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body:  # sent in pieces, without saying how much
                raise HTTPException(413, f"the body is larger than {self._max_body} bytes")
            if copy is not None:
                copy.extend(message.get("body", b""))
            return message

        return limited


def _given_key(authorization: bytes) -> bytes:
    kind, _, given = authorization.partition(b" ")
    if kind.lower() == b"bearer":
        return given.strip()
    if kind.lower() == b"basic":
        try:
            return base64.b64decode(given.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""
