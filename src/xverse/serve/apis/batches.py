"""``/v1/files`` and ``/v1/batches`` of OpenAI's API, if the server has a folder for them."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Annotated, Any, Literal

import fastapi
from fastapi import FastAPI, Query, Response
from fastapi.responses import FileResponse, JSONResponse
from pydantic import Field, StrictStr
from starlette.datastructures import UploadFile

from xverse.config import UserError
from xverse.log import notice
from xverse.serve.access_log import current
from xverse.serve.batches import Batch, Batches
from xverse.serve.errors import ApiError
from xverse.serve.exchange import page_of
from xverse.serve.fields import Body, Metadata
from xverse.serve.file_store import StoredFile
from xverse.serve.service import Service

_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
Order = Literal["asc", "desc"]
Limit = Annotated[int, Query(ge=1, le=10_000)]


class BatchCreation(Body):
    """``POST /v1/batches``."""

    # ``metadata`` is stored here.
    without_effect = Body.without_effect - {"metadata"}

    input_file_id: Annotated[StrictStr, Field(min_length=1)]
    endpoint: StrictStr
    completion_window: Literal["24h"]
    metadata: Metadata | None = None


def mount(app: FastAPI, service: Service) -> None:
    def batches() -> Batches:
        if service.batches is None:
            text = "files and batches are not kept; start the server with --batch-folder"
            raise ApiError(404, text, code="batches_off")
        return service.batches

    @app.post("/v1/files")
    async def upload(request: fastapi.Request) -> Response:
        store = batches().files
        async with request.form(max_files=1, max_fields=20) as form:
            file, purpose = form.get("file"), form.get("purpose")
            known = ("file", "purpose", _ANCHOR, _SECONDS)
            current().ignored = tuple(name for name in form if name not in known)
            if not isinstance(file, UploadFile):
                raise ApiError(400, "file: send a file as multipart/form-data", code="missing_field")
            if purpose != "batch":
                text = "purpose: must be 'batch'" if purpose else "purpose: required field is missing"
                raise ApiError(400, text, code="invalid_value" if purpose else "missing_field")
            expires = _expiry(form.get(_ANCHOR), form.get(_SECONDS))
            store.check_room(file.size or 0)
            name = file.filename or "upload.jsonl"
            arguments = (file.file, name[:200], "batch", current().key)
            try:
                added = await asyncio.to_thread(lambda: store.add(*arguments, expires_at=expires))
            except UserError as error:  # such as a full disk
                notice(f"serve: {error}")
                raise ApiError(
                    507, "file: the server could not store it", param="file", code="storage_failed"
                ) from None
        return JSONResponse(added.described())

    @app.get("/v1/files")
    async def files(
        limit: Limit = 10_000, after: str = "", order: Order = "desc", purpose: str = ""
    ) -> dict[str, Any]:
        found = [file for file in batches().files.owned(current().key) if purpose in ("", file.purpose)]
        found = found[::-1] if order == "asc" else found
        return page_of([file.described() for file in found], limit, after)

    @app.get("/v1/files/{name}")
    async def file(name: str) -> dict[str, Any]:
        return _file(batches(), name).described()

    @app.get("/v1/files/{name}/content")
    async def content(name: str) -> Response:
        found = _file(batches(), name)
        return FileResponse(batches().files.path(found), media_type="application/octet-stream")

    @app.delete("/v1/files/{name}")
    async def delete(name: str) -> dict[str, Any]:
        found = _file(batches(), name)
        if batches().uses(found):
            raise ApiError(
                409, f"the file '{name}' is in use by a batch", param="file_id", code="file_in_use"
            )
        batches().files.delete(found)
        return {"id": name, "object": "file", "deleted": True}

    @app.post("/v1/batches")
    async def create(body: BatchCreation) -> Response:
        kept = batches()
        found = kept.files.get(body.input_file_id, current().key)
        if found is None or found.purpose != "batch":
            raise ApiError(400, f"input_file_id: '{body.input_file_id[:80]}' is not a file for batches")
        if body.endpoint not in kept.urls:
            raise ApiError(400, f"endpoint: must be one of {', '.join(kept.urls)}")
        batch = kept.create(found, body.endpoint, body.metadata, current().key)
        return JSONResponse(_shown(batch))

    @app.get("/v1/batches")
    async def every(limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str = "") -> dict[str, Any]:
        return page_of([_shown(batch) for batch in batches().owned(current().key)], limit, after)

    @app.get("/v1/batches/{name}")
    async def batch(name: str) -> dict[str, Any]:
        return _shown(_batch(batches(), name))

    @app.post("/v1/batches/{name}/cancel")
    async def cancel(name: str) -> dict[str, Any]:
        found = _batch(batches(), name)
        try:
            batches().cancel(found)
        except UserError as error:
            raise ApiError(409, str(error), param="batch_id", code="batch_ended") from None
        return _shown(found)


def _shown(batch: Batch) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "owner"}


def _file(batches: Batches, name: str) -> StoredFile:
    found = batches.files.get(name, current().key)
    if found is None:
        raise ApiError(404, f"the file '{name[:80]}' does not exist", param="file_id", code="file_not_found")
    return found


def _batch(batches: Batches, name: str) -> Batch:
    found = batches.get(name, current().key)
    if found is None:
        raise ApiError(
            404, f"the batch '{name[:80]}' does not exist", param="batch_id", code="batch_not_found"
        )
    return found


def _expiry(anchor: Any, seconds: Any) -> int | None:
    """OpenAI's ``expires_after``: the time from which the file does not exist any more."""
    if anchor is None and seconds is None:
        return None
    if (
        anchor != "created_at"
        or not re.fullmatch(r"\d{4,7}", str(seconds))
        or not 3600 <= int(seconds) <= 2592000
    ):
        text = "expires_after: must have the anchor 'created_at' and seconds from 3600 to 2592000"
        raise ApiError(400, text)
    return int(time.time()) + int(seconds)
