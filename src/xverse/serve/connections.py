"""Connections that send nothing, or too slowly, are closed; so are those above the limit of descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from xverse.log import notice
from xverse.serve import errors

HEAD_SECONDS = 30.0  # for a request's head, and for the first byte of the first request
MOST_CONNECTIONS = 10_000
_RESERVED = 64  # descriptors for files, grammars and the page, if there are that many
_COMPLAIN_EVERY = 60.0  # seconds
_STATUS = {408: b"Request Timeout", 503: b"Service Unavailable"}


class Waiting:
    """The connections without a complete request, in the order in which they began to wait."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.connections: dict[Connection, None] = {}


class Connection(H11Protocol):
    """uvicorn's protocol with a deadline for the head of a request. ``Guard`` has those for bodies."""

    def __init__(self, *args: Any, waiting: Waiting, **options: Any) -> None:
        super().__init__(*args, **options)
        self._waiting = waiting
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._waiting.most:
            longest = next(iter(self._waiting.connections), None)
            if longest is None:
                self._refuse(503, "the server has too many connections", "too_many_connections")
                return
            longest._refuse(503, "the server has too many connections", "too_many_connections")
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._deadline is None and self._between_requests():
            self._await_head()
        super().data_received(data)
        if not self._between_requests():
            self._forget()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._between_requests() or self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:  # a part of the next request
            self._unset_keepalive_if_required()
            self._await_head()
        else:
            self._waiting.connections[self] = None  # uvicorn ends an idle connection after a few seconds

    def shutdown(self) -> None:
        """Called when the server ends: close the connection unless a response is being made."""
        cycle = self.cycle
        if (
            cycle is not None
            and not cycle.response_complete
            and not cycle.response_started
            and cycle.more_body
        ):
            self.transport.abort()  # its request will not be answered; close waits for the client in TLS
            return
        with contextlib.suppress(h11.LocalProtocolError):  # the client has closed its side
            super().shutdown()
            return
        self.transport.close()

    def _between_requests(self) -> bool:
        return self.conn.their_state in (h11.IDLE, h11.DONE, h11.MUST_CLOSE) and (
            self.cycle is None or self.cycle.response_complete
        )

    def _await_head(self) -> None:
        self._waiting.connections[self] = None
        text = f"the head of the request did not arrive within {HEAD_SECONDS:g} s"
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._refuse, 408, text, "request_timeout")

    def _forget(self) -> None:
        self._waiting.connections.pop(self, None)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer without the application, and close."""
        self._forget()
        if self.transport.is_closing():
            return
        body = json.dumps(errors.body(status, message, code=code)).encode()
        head = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        with contextlib.suppress(h11.LocalProtocolError):
            response = h11.Response(status_code=status, headers=[*head.items()], reason=_STATUS[status])
            events = (response, h11.Data(data=body), h11.EndOfMessage())
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()


def protocol() -> Callable[..., Connection]:
    """The protocol factory of one server, for ``uvicorn.Config(http=…)``."""
    return functools.partial(Connection, waiting=Waiting(_most_connections()))


def _most_connections() -> int:
    """As many as there are descriptors, after raising their limit as far as allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MOST_CONNECTIONS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    used = len(list(Path("/dev/fd").iterdir()))
    left = max(0, soft - used)
    return max(8, min(MOST_CONNECTIONS, left - min(_RESERVED, left // 2)))


class LoopErrors:
    """asyncio's exception handler: one line per kind of error and minute, not a traceback for each."""

    def __init__(self) -> None:
        self._reported: dict[str, float] = {}

    def __call__(self, loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
        error = context.get("exception")
        text = f"{context['message']}: {type(error).__name__}: {error}" if error else context["message"]
        now = time.monotonic()
        if now - self._reported.get(text, -_COMPLAIN_EVERY) >= _COMPLAIN_EVERY:
            if len(self._reported) > 100:
                self._reported.clear()
            self._reported[text] = now
            notice(f"serve: {text}")
