"""What the routes of every API share: streams, and work that ends when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, TypeVar

import fastapi
from fastapi import HTTPException, Response
from fastapi.responses import JSONResponse, StreamingResponse

from xverse.engine import Request
from xverse.serve.errors import ApiError
from xverse.serve.runner import EngineRunner
from xverse.serve.service import Service

SSE, NDJSON = "text/event-stream", "application/x-ndjson"
_Result = TypeVar("_Result")


class Reply(Protocol):
    """What an API makes of ``requests``: one body, or the chunks of a stream."""

    @property
    def requests(self) -> Sequence[Request]: ...
    async def body(self) -> dict[str, Any]: ...
    def chunks(self) -> AsyncGenerator[bytes, None]: ...


def page_of(items: Sequence[dict[str, Any]], limit: int, after: str) -> dict[str, Any]:
    """OpenAI's page of a list: at most ``limit`` items behind the one whose id is ``after``."""
    first = 0
    if after:
        first = next((at + 1 for at, item in enumerate(items) if item["id"] == after), 0)
        if not first:
            raise ApiError(404, f"after: the list has no '{after[:80]}'", code="not_found")
    part = items[first : first + limit]
    ends = {"first_id": part[0]["id"], "last_id": part[-1]["id"]} if part else {}
    return {"object": "list", "data": part, "has_more": first + limit < len(items), **ends}


class _Stream(StreamingResponse):
    """Its requests are admitted before it begins, because afterwards an error cannot be the response."""

    def __init__(self, runner: EngineRunner, reply: Reply, headers: Mapping[str, str], kind: str) -> None:
        self._admission = ExitStack()
        self._admission.enter_context(runner.admitted(reply.requests, len(reply.requests)))
        headers = {**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # no buffering in nginx
        super().__init__(reply.chunks(), media_type=kind, headers=headers)

    async def __call__(self, *arguments: Any) -> None:
        with self._admission:
            await super().__call__(*arguments)


async def respond(
    service: Service,
    request: fastapi.Request,
    reply: Reply,
    stream: bool | None,
    *,
    kind: str = SSE,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The response of a reply, as a stream or as JSON. Raises Busy or Draining, for a stream too."""
    runner, requests = service.runner, reply.requests
    if stream:
        return _Stream(runner, reply, headers or {}, kind)
    with runner.admitted(requests, min(len(requests), runner.engine.max_batch)):
        return JSONResponse(await while_connected(request, reply.body()), headers=dict(headers or {}))


async def while_connected(request: fastapi.Request, work: Awaitable[_Result]) -> _Result:
    """The result of ``work``. A disconnect of the client cancels it and raises HTTPException 499."""
    task = asyncio.ensure_future(work)

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watcher = asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "the client has left")
        return task.result()
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
