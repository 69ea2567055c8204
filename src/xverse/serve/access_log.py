"""One record for each HTTP request: its id, a line of the access log, and the HTTP metrics.

This is the outermost layer, so refused requests are counted and logged too. Handlers add to the record of
their request through ``current``.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import hashlib
import json
import re
import sys
import time
import urllib.parse
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import RedirectResponse

from xverse.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

LONG_SECONDS = 30.0  # a request that takes longer is also logged while it runs
# Open to load balancers and Prometheus without a key; they expose no user text.
PROBES = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})
_CLIENT_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_ASSETS = ("text/css", "text/javascript", "application/javascript", "font/", "image/")
_MOST_NAMED = 32  # ignored fields in the header
_CLOSED = 499  # nginx's status for a client that left before the response was complete


@dataclass
class Record:
    """What is known of one request. ``usage`` returns its token counts so far."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    path: str = ""
    field_names: Mapping[str, str] = field(default_factory=dict)  # the API's, by the common names
    key: str | None = None
    model: str | None = None
    error: str | None = None
    ignored: tuple[str, ...] = ()  # unknown fields of the body
    failed: int | None = None  # status of an error that came after the response had begun
    usage: Callable[[], Mapping[str, Any]] | None = None

    def fail(self, status: int, code: str | None) -> None:
        """An error of the API; in a stream it comes after HTTP status 200."""
        self.failed, self.error = status, code or "error"


_record: contextvars.ContextVar[Record | None] = contextvars.ContextVar("record", default=None)


def current() -> Record:
    """The record of the request that is being handled; outside of requests, one that nobody reads."""
    return _record.get() or Record()


def fingerprint(key: bytes) -> str:
    """Eight hexadecimal digits that identify an API key in the log."""
    return hashlib.sha256(key).hexdigest()[:8]


class AccessLog:
    """Plain ASGI middleware. ``log``: write one JSON line per request to stderr; ``contents`` adds the bodies
    of ``/v1/`` and ``/api/``. Successful probes and assets of the page are counted and not logged. ``root``
    is the path that the server is reached under, such as ``/xv``, whether or not a proxy removes it."""

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        metrics: Metrics,
        *,
        log: bool = True,
        contents: bool = False,
        root: str = "",
    ) -> None:
        self._app, self._metrics, self._log, self._contents, self._root = app, metrics, log, contents, root

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        app = self._app
        if self._root and scope["path"] == self._root:  # the page's own addresses are relative
            app = RedirectResponse(self._root + "/")
        elif self._root and scope["path"].startswith(self._root + "/"):
            scope["path"] = scope["path"].removeprefix(self._root)
        headers = {name.lower(): value for name, value in scope["headers"]}
        sent_id = headers.get(b"x-request-id", b"").decode("latin-1")
        record = Record(id=sent_id) if _CLIENT_ID.fullmatch(sent_id) else Record()
        record.path = scope["path"]
        exchange = _Exchange(scope, record, keep=self._log and self._contents and _is_api(scope["path"]))
        token = _record.set(record)
        begun = None
        if self._log:
            loop = asyncio.get_running_loop()
            begun = loop.call_later(LONG_SECONDS, lambda: _print(exchange.line("running")))
        try:
            await app(scope, exchange.receiving(receive), exchange.sending(send))
        finally:
            if begun is not None:
                begun.cancel()
            _record.reset(token)
            self._metrics.http(exchange.handler(), scope["method"], exchange.outcome(), exchange.seconds())
            if self._log and exchange.worth_logging():
                _print(exchange.line("done" if exchange.complete else "cut"))


class _Exchange:
    """A request and its response as they pass by."""

    def __init__(self, scope: Scope, record: Record, keep: bool) -> None:
        self._scope, self._record, self._keep = scope, record, keep
        self._path = scope["path"]  # the application may change the scope's
        self._begin, self._status, self._sent, self._type = time.monotonic(), 0, 0, ""
        self._request, self._response = bytearray(), bytearray()
        self.complete = False

    def receiving(self, receive: Receive) -> Receive:
        if not self._keep:
            return receive

        async def received() -> MutableMapping[str, Any]:
            message = await receive()
            self._request.extend(message.get("body", b""))
            return message

        return received

    def sending(self, send: Send) -> Send:
        async def sent(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._status = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", self._record.id.encode())]
                if self._record.ignored:
                    headers.append((b"x-ignored-fields", _listed(self._record.ignored)))
                types = (value for name, value in headers if name.lower() == b"content-type")
                self._type = next(types, b"").decode("latin-1")
                message = {**message, "headers": headers}
            body = message.get("body", b"")
            if self._keep:
                self._response.extend(body)
            await send(message)
            self._sent += len(body)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                self.complete = True

        return sent

    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def outcome(self) -> int:
        """The HTTP status; that of a stream's error event; 499 for a response that was cut short."""
        if self._record.failed is not None and self._status == 200:
            return self._record.failed
        return self._status if self.complete else _CLOSED

    def handler(self) -> str:
        """The route, without what clients choose freely."""
        path = getattr(self._scope.get("route"), "path", "")
        return path if path and not path.endswith("{path:path}") else "other"

    def worth_logging(self) -> bool:
        fine = self.complete and self._status < 400 and self._scope["method"] in ("GET", "HEAD")
        return not (fine and (self._path in PROBES or self._type.startswith(_ASSETS)))

    def line(self, state: str) -> dict[str, Any]:
        record = self._record
        line: dict[str, Any] = {
            "time": round(time.time(), 3),
            "id": record.id,
            "client": (self._scope.get("client") or ("unix", 0))[0],
            "method": self._scope["method"],
            "path": self._path,
            "status": self._status,
            "state": state,
            "bytes": self._sent,
            "seconds": round(self.seconds(), 3),
        }
        optional = {"key": record.key, "model": record.model, "error": record.error}
        line |= {name: value for name, value in optional.items() if value is not None}
        if record.ignored:
            line["ignored_fields"] = record.ignored
        if record.usage is not None:
            used = record.usage()
            line["prompt_tokens"] = used["prompt_tokens"]
            line["cached_tokens"] = used["prompt_tokens_details"]["cached_tokens"]
            line["completion_tokens"] = used["completion_tokens"]
        if self._keep and state != "running":
            line["request"], line["response"] = _readable(self._request), _readable(self._response)
        return line


def _listed(names: Sequence[str]) -> bytes:
    """The first ``_MOST_NAMED`` names as the value of a header."""
    quoted = [urllib.parse.quote(name[:64], errors="replace") or '""' for name in names]
    return ", ".join([*quoted[:_MOST_NAMED], *(["..."] if len(quoted) > _MOST_NAMED else [])]).encode()


def _is_api(path: str) -> bool:
    return path.startswith(("/v1/", "/api/")) and not path.startswith("/v1/files")  # may be 100 MB


def _readable(body: bytearray) -> Any:
    """A JSON body as its value, so that its texts are not escaped twice; another one as text."""
    text = body.decode("utf-8", errors="replace")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _print(line: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError, ValueError):  # a full disk or a closed pipe must not fail requests
        print(json.dumps(line, ensure_ascii=False), file=sys.stderr, flush=True)
