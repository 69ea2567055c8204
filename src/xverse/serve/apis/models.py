"""``/v1/models``: the model and its adapters, in a form that OpenAI's and Anthropic's clients both read."""

from __future__ import annotations

import datetime
from typing import Any

from fastapi import FastAPI

from xverse.serve.service import Service


def mount(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        services = [service, *service.adapted.values()]
        ends = {"has_more": False, "first_id": service.name, "last_id": services[-1].name}
        return {"object": "list", "data": [_model(each) for each in services], **ends}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return _model(service.of(name))


def _model(service: Service) -> dict[str, Any]:
    created = datetime.datetime.fromtimestamp(service.created, datetime.UTC)
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "xverse",
        "parent": service.parent,  # vLLM's name of an adapter's base
        "max_model_len": service.context,
        # Anthropic's names
        "type": "model",
        "display_name": service.name,
        "lifecycle": "active",
        "max_input_tokens": service.context,
        "max_tokens": service.context,
        "created_at": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
