"""The routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

import xverse
from xverse.serve import errors
from xverse.serve.chat_reply import ChatReply
from xverse.serve.completion_reply import CompletionReply
from xverse.serve.page import mount
from xverse.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from xverse.serve.service import Service

_Result = TypeVar("_Result")
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


def create_app(service: Service, page: str | None = None, root: str = "") -> FastAPI:
    """The application, which starts the runner. ``page``: the web page's first tab, or None for no page;
    ``root``: the path that it is reached under."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.runner.start()
        yield
        await service.runner.drain(timeout=service.timeout)

    app = FastAPI(
        title="XVERSE",
        version=xverse.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        root_path=root,
    )
    for kind, handler in errors.HANDLERS.items():
        app.add_exception_handler(kind, handler)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        # In a thread, because tokenising a long text would block other requests.
        grammar = await _while_connected(request, service.grammar(body))
        reply = ChatReply(service, body, await asyncio.to_thread(service.chat, body, grammar))
        if body.stream:
            return _stream(service, reply.chunks(), body.headers())
        return JSONResponse(await _while_connected(request, reply.body()), headers=body.headers())

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        grammar = await _while_connected(request, service.grammar(body))
        reply = CompletionReply(service, body, await asyncio.to_thread(service.complete, body, grammar))
        if body.stream:
            return _stream(service, reply.chunks(), body.headers())
        return JSONResponse(await _while_connected(request, reply.body()), headers=body.headers())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model(service)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        return JSONResponse(await asyncio.to_thread(service.tokenize, body), headers=body.headers())

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        text = service.tokenizer.decode(body.tokens, skip_special=False)
        return JSONResponse({"text": text, "prompt": text}, headers=body.headers())  # vLLM's name is prompt

    @app.api_route("/health", methods=["GET", "HEAD"])
    @app.api_route("/health/ready", methods=["GET", "HEAD"])
    async def ready() -> Response:
        healthy = service.runner.ready()
        runner = service.runner
        state = "draining" if runner.draining else "ready" if healthy else "dead" if runner.dead else "stuck"
        return JSONResponse({"status": state}, status_code=200 if healthy else 503)

    @app.api_route("/health/live", methods=["GET", "HEAD"])
    async def live() -> Response:
        alive = service.runner.alive()
        return JSONResponse({"status": "live" if alive else "dead"}, status_code=200 if alive else 503)

    @app.api_route("/metrics", methods=["GET", "HEAD"])
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # Unknown paths under /v1 get an error in the API's form.
    @app.api_route("/v1/{path:path}", methods=[*_METHODS], include_in_schema=False)
    async def unknown(path: str, request: Request) -> None:
        raise HTTPException(405 if errors.exists(request, f"/v1/{path}") else 404)

    if page is not None:
        mount(app, service, first=page)
    return app


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "xverse",
        "max_model_len": service.context,
    }


def _stream(service: Service, chunks: AsyncGenerator[bytes, None], headers: dict[str, str]) -> Response:
    service.runner.check_room()
    headers = {**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # no buffering in nginx
    return StreamingResponse(chunks, media_type="text/event-stream", headers=headers)


async def _while_connected(request: Request, work: Awaitable[_Result]) -> _Result:
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
