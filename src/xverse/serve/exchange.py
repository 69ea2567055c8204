"""What the routes of every API share: streams, and work that ends when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

from fastapi import HTTPException, Request, Response
from fastapi.responses import StreamingResponse

from xverse.serve.service import Service

SSE, NDJSON = "text/event-stream", "application/x-ndjson"
_Result = TypeVar("_Result")


def streamed(
    service: Service, chunks: AsyncGenerator[bytes, None], headers: dict[str, str], kind: str = SSE
) -> Response:
    """A response of ``chunks``. Raises Busy or Draining while an error can still be the response."""
    service.runner.check_room()
    headers = {**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # no buffering in nginx
    return StreamingResponse(chunks, media_type=kind, headers=headers)


async def while_connected(request: Request, work: Awaitable[_Result]) -> _Result:
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
