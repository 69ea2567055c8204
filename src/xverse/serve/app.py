"""The routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse

import xverse
from xverse.serve import errors
from xverse.serve.apis import (
    adapters,
    batches,
    chat,
    completions,
    embeddings,
    messages,
    models,
    ollama,
    responses,
    scores,
    tokens,
)
from xverse.serve.caller import Caller
from xverse.serve.json_body import Route
from xverse.serve.page import mount
from xverse.serve.service import Service

APIS = (chat, completions, responses, messages, embeddings, scores, ollama, models, tokens, adapters, batches)
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


def create_app(service: Service, page: str | None = None, root: str = "") -> FastAPI:
    """The application, which starts the runner. ``page``: the web page's first tab, or None for no page;
    ``root``: the path that it is reached under."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.runner.start()
        async with AsyncExitStack() as stack:
            if service.batches is not None:
                call = Caller(app, service.metrics).call
                at_once = max(1, service.runner.engine.max_batch // 2)  # the rest is for those who wait
                draining = lambda: service.runner.draining  # noqa: E731
                await stack.enter_async_context(service.batches.running(call, at_once, draining))
            yield
        await service.runner.drain(timeout=service.timeout)

    app = FastAPI(
        title="XVERSE",
        version=xverse.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        root_path=root,
        redirect_slashes=False,
    )
    app.router.route_class = Route
    for kind, handler in errors.HANDLERS.items():
        app.add_exception_handler(kind, handler)

    for api in APIS:
        api.mount(app, service)

    @app.get("/health")
    @app.get("/health/ready")
    async def ready() -> Response:
        healthy = service.runner.ready()
        runner = service.runner
        state = "draining" if runner.draining else "ready" if healthy else "dead" if runner.dead else "stuck"
        return JSONResponse({"status": state}, status_code=200 if healthy else 503)

    @app.get("/health/live")
    async def live() -> Response:
        alive = service.runner.alive()
        return JSONResponse({"status": "live" if alive else "dead"}, status_code=200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # Unknown paths of an API get an error in its form.
    @app.api_route("/v1/{path:path}", methods=[*_METHODS], include_in_schema=False)
    @app.api_route("/api/{path:path}", methods=[*_METHODS], include_in_schema=False)
    async def unknown(path: str, request: Request) -> None:
        raise HTTPException(405 if errors.methods(request, request.url.path) else 404)

    if page is not None:
        mount(app, service, first=page)
    return app


class InProcess(Caller):
    """The application of a service in this process, without a server. ``call`` it within ``running``."""

    def __init__(self, service: Service) -> None:
        self._api = create_app(service)
        super().__init__(self._api, service.metrics)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with self._api.router.lifespan_context(self._api):
            yield
