"""Checks of every request: host name, origin, API key, size; and the access log."""

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

# Open to load balancers and Prometheus without a key; they expose no user text.
OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})

# The page runs scripts of this server only, and no text can become markup (trusted types): what a model
# writes cannot act. Nothing is fetched from other hosts (an image's URL could leak a conversation), and other
# pages must not embed this one in a frame.
_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
        b"connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'; "
        b"require-trusted-types-for 'script'; trusted-types 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    """Plain ASGI middleware, so that streams pass through unchanged.

    ``hosts``: the host names that requests may use (None: any). This stops DNS rebinding, where another
    site's page makes the browser send requests to 127.0.0.1 under that site's name. Cross-origin requests
    are refused, except from ``origins``. ``keys``: if not empty, requests need one of them as a bearer token
    or as the password of HTTP basic authentication. Bodies above ``max_body`` bytes are refused. The log has
    one JSON line per request; ``contents`` adds requests and replies of ``/v1/``.
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
        if scope["type"] == "websocket":  # not supported, and not checked below
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status, sent = time.monotonic(), 0, 0
        keep = self._log and self._contents and scope["path"].startswith("/v1/")
        request_body, response_body = bytearray(), bytearray()

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
            sent += len(message.get("body", b""))
            if keep:
                response_body.extend(message.get("body", b""))
            await send(message)

        try:
            refused = self._refusal(scope)
            if refused is not None:
                await refused(scope, receive, counted)
            else:
                await self._app(scope, self._limited(receive, request_body if keep else None), counted)
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
                    line["request"] = request_body.decode("utf-8", errors="replace")
                    line["response"] = response_body.decode("utf-8", errors="replace")
                print(json.dumps(line), file=sys.stderr, flush=True)

    def _refusal(self, scope: Scope) -> Any:
        headers = {key.lower(): value for key, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = (host.rsplit(":", 1)[0] if not host.endswith("]") else host).strip("[]")
        if self._hosts is not None and name not in self._hosts:
            return errors.answer(421, f"the host name '{name}' is not allowed (--allowed-host)", code="host")
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and origin not in self._origins and not self._own(origin, name):
            return errors.answer(
                403, f"the origin '{origin}' is not allowed (--allowed-origin)", code="origin"
            )
        if self._keys and scope["path"] not in OPEN_PATHS:
            key_sent = _sent_key(headers.get(b"authorization", b""))
            matches = [hmac.compare_digest(key_sent, key) for key in self._keys]  # all, in constant time
            if not any(matches):
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
            if received > self._max_body:  # chunked, without Content-Length
                raise HTTPException(413, f"the body is larger than {self._max_body} bytes")
            if copy is not None:
                copy.extend(message.get("body", b""))
            return message

        return limited


def _sent_key(authorization: bytes) -> bytes:
    kind, _, value = authorization.partition(b" ")
    if kind.lower() == b"bearer":
        return value.strip()
    if kind.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""
