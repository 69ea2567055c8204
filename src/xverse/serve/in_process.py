"""The application of a service in this process, without a server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from xverse.serve.app import create_app
from xverse.serve.caller import Caller
from xverse.serve.service import Service


class InProcess(Caller):
    """The application of a service. ``call`` it within ``running``."""

    def __init__(self, service: Service) -> None:
        self._api = create_app(service)
        super().__init__(self._api, service.metrics)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with self._api.router.lifespan_context(self._api):
            yield
