"""Adapters at run time, in vLLM's form: ``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Response
from fastapi.responses import PlainTextResponse
from pydantic import Field, StrictBool, StrictInt, StrictStr

from xverse.config import UserError
from xverse.serve.errors import ApiError
from xverse.serve.fields import Body
from xverse.serve.service import Service


class LoadRequest(Body):
    """``POST /v1/load_lora_adapter``. ``load_inplace``: replace an adapter of the same name."""

    lora_name: Annotated[StrictStr, Field(min_length=1)]
    lora_path: Annotated[StrictStr, Field(min_length=1)]
    base_model_name: StrictStr | None = None
    load_inplace: StrictBool = False


class UnloadRequest(Body):
    """``POST /v1/unload_lora_adapter``."""

    lora_name: Annotated[StrictStr, Field(min_length=1)]
    lora_int_id: StrictInt | None = None


def mount(app: FastAPI, service: Service) -> None:
    lock = asyncio.Lock()

    @app.post("/v1/load_lora_adapter")
    async def load(body: LoadRequest) -> Response:
        name = body.lora_name
        if body.base_model_name not in (None, service.name):
            raise ApiError(400, f"base_model_name: '{body.base_model_name[:80]}' is not this server's model")
        path = _path(service, body.lora_path)
        async with lock:
            before = service.adapted.get(name)
            if before is None:
                try:
                    service.check_new(name)
                except UserError as error:
                    raise ApiError(400, f"lora_name: {error}") from None
            elif not body.load_inplace:
                text = f"lora_name: '{name}' is already loaded; load_inplace replaces it"
                raise ApiError(400, text, code="adapter_exists")
            else:
                _check_unused(service, before)
            assert service.read_adapter is not None
            try:
                adapter = await asyncio.to_thread(service.read_adapter, path)
            except UserError as error:
                text = f"lora_path: {str(error).replace(str(path), body.lora_path)}"
                raise ApiError(400, text, code="bad_adapter") from None
            service.adapted.pop(name, None)
            service.adopt(name, adapter)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadRequest) -> Response:
        _folder(service)
        async with lock:
            found = service.adapted.get(body.lora_name)
            if found is None:
                text = f"lora_name: no adapter is called '{body.lora_name[:80]}'"
                raise ApiError(404, text, code="adapter_not_found")
            _check_unused(service, found)
            del service.adapted[body.lora_name]
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _check_unused(service: Service, adapted: Service) -> None:
    if count := service.runner.uses[adapted.adapter]:
        replies = "1 request" if count == 1 else f"{count} requests"
        text = f"lora_name: '{adapted.name}' is in use by {replies}; try again when they have ended"
        raise ApiError(409, text, code="adapter_in_use")


def _folder(service: Service) -> Path:
    if service.adapter_folder is None:
        text = "adapters are not managed at run time; start the server with --adapter-folder"
        raise ApiError(403, text, code="adapters_fixed")
    return service.adapter_folder


def _path(service: Service, given: str) -> Path:
    """A directory in the folder of adapters. Raises ApiError without telling what is elsewhere."""
    folder = _folder(service)
    try:
        path = (folder / given).resolve()
        inside = path.is_relative_to(folder) and path != folder
        exists = inside and path.is_dir()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, a loop of links
        inside = False
    if not inside:
        text = f"lora_path: '{given[:200]}' is not in the server's folder of adapters"
        raise ApiError(400, text, code="path_not_allowed")
    if not exists:
        raise ApiError(404, f"lora_path: '{given[:200]}' does not exist", code="adapter_not_found")
    return path
