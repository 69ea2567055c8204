"""Checks of every request: host name, origin, API key and size."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException

from xverse.serve import errors
from xverse.serve.access_log import PROBES, Receive, Scope, Send, current, fingerprint

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


BODY_SECONDS, BODY_RATE = 30.0, 10_000  # a body may take that time, and longer at that rate in bytes/s
_CLOSE = {"Connection": "close"}  # the rest of the body is not read


_FORM = (b"content-type", b"application/x-www-form-urlencoded")


def _for_routes(scope: Scope) -> Scope:
    """The request as the routes take it: HEAD is GET, whose body uvicorn does not send. A form's body under
    ``/api/`` is JSON: Ollama's documentation calls curl without a header, and Ollama reads such a body. Forms
    of other sites' pages have been refused before."""
    scope = {**scope, "method": "GET" if scope["method"] == "HEAD" else scope["method"]}
    if scope["path"].startswith("/api/") and _FORM in scope["headers"]:
        headers = [header for header in scope["headers"] if header != _FORM]
        scope["headers"] = [*headers, (b"content-type", b"application/json")]
    return scope


class Guard:
    """Plain ASGI middleware, so that streams pass through unchanged.

    ``hosts``: the host names that requests may use (None: any). This stops DNS rebinding, where another
    site's page makes the browser send requests to 127.0.0.1 under that site's name. Cross-origin requests
    are refused, except from ``origins``. ``keys``: if not empty, requests need one of them as a bearer token,
    in ``x-api-key``, or as the password of HTTP basic authentication. Bodies above ``max_body`` bytes are
    refused, and those that arrive too slowly; ``max_upload`` is the limit of files, if not the same.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        *,
        hosts: Sequence[str] | None,
        keys: Sequence[str],
        max_body: int,
        max_upload: int | None = None,
        origins: Sequence[str] = (),
    ) -> None:
        self._app = app
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self._keys = keys  # the list itself: SIGHUP replaces its contents
        self._max_body, self._max_upload = max_body, max_upload
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # not supported, and not checked below
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
            await send(message)

        refused = self._refusal(scope)
        if refused is not None:
            await refused(scope, receive, with_headers)
        else:
            most = self._most(scope)
            inner = _for_routes(scope)
            try:
                await self._app(inner, self._limited(receive, most), with_headers)
            finally:
                scope["route"] = inner.get("route")  # for the metrics

    def _refusal(self, scope: Scope) -> Any:
        headers = {key.lower(): value for key, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = (host.rsplit(":", 1)[0] if not host.endswith("]") else host).strip("[]")
        if self._hosts is not None and name not in self._hosts:
            allowed = ", ".join(sorted(self._hosts))
            text = f"the host name '{name}' is not allowed, only {allowed}; --allowed-host {name} adds it"
            if not name:
                text = f"the request has no host name; allowed are {allowed}"
            return errors.answer(421, text, code="host")
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and origin not in self._origins and not self._own(origin, name):
            return errors.answer(
                403, f"the origin '{origin}' is not allowed (--allowed-origin)", code="origin"
            )
        if self._keys and scope["path"] not in PROBES:
            key_sent = _sent_key(headers)
            matches = [hmac.compare_digest(key_sent, key.encode()) for key in self._keys]  # in constant time
            if any(matches):
                current().key = fingerprint(key_sent)
            else:
                text = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
                is_api = scope["path"].startswith(("/v1/", "/api/"))
                kind = "Bearer" if is_api else 'Basic realm="API key as password"'
                return errors.answer(401, text, code="invalid_api_key", headers={"WWW-Authenticate": kind})
        coding = headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
        if coding not in ("", "identity"):
            text = f"bodies in the content coding '{coding[:40]}' are not supported; send them uncompressed"
            return errors.answer(
                415, text, code="unsupported_encoding", headers={"Accept-Encoding": "identity"}
            )
        length, most = headers.get(b"content-length", b"0"), self._most(scope)
        if length.isdigit() and int(length) > most:
            return errors.answer(413, f"the body is larger than {most} bytes", code="body_too_large")
        return None

    def _most(self, scope: Scope) -> int:
        """The most bytes of the body; around a file there are a few lines of the form."""
        if self._max_upload is not None and scope["path"] == "/v1/files":
            return max(self._max_body, self._max_upload + 10_000)
        return self._max_body

    def _own(self, origin: str, host: str) -> bool:
        name = urllib.parse.urlsplit(origin).hostname or ""
        return name == host or (self._hosts is not None and name in self._hosts)

    def _limited(self, receive: Receive, most: int) -> Receive:
        received, complete = 0, False
        begin = time.monotonic()

        async def limited() -> MutableMapping[str, Any]:
            nonlocal received, complete
            if complete:  # what follows is the client's leaving
                return await receive()
            left = begin + BODY_SECONDS + received / BODY_RATE - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0.001))
            except TimeoutError:
                text = f"the body arrives too slowly ({received} bytes in {BODY_SECONDS:g} s or more)"
                raise HTTPException(408, text, _CLOSE) from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body")
            if received > most:  # chunked, without Content-Length
                raise HTTPException(413, f"the body is larger than {most} bytes", _CLOSE)
            return message

        return limited


def _sent_key(headers: Mapping[bytes, bytes]) -> bytes:
    """The key in Anthropic's ``x-api-key``, or else in ``Authorization``."""
    if b"x-api-key" in headers:
        return headers[b"x-api-key"].strip()
    authorization = headers.get(b"authorization", b"")
    kind, _, value = authorization.partition(b" ")
    if kind.lower() == b"bearer":
        return value.strip()
    if kind.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""
