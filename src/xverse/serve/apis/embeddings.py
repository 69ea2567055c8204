"""``/v1/embeddings``: the model's last hidden states, pooled over a text and scaled to length 1."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import fastapi
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from pydantic import PlainValidator, StrictInt, StrictStr

from xverse.config import UserError
from xverse.engine import Request
from xverse.engine.request import Pooling
from xverse.serve.errors import ApiError
from xverse.serve.exchange import while_connected
from xverse.serve.fields import Body, rule
from xverse.serve.protocol import Whole, texts_or_ids
from xverse.serve.replies import Choice, begun, usage, whole
from xverse.serve.service import Service

MOST_INPUTS, MOST_TOKENS = 2048, 300_000  # of a request, as at OpenAI
Inputs = list[str | list[int]]


def _inputs(value: Any) -> Inputs:
    inputs = texts_or_ids(value, MOST_INPUTS, "inputs")
    for index, one in enumerate(inputs):
        if not one:
            raise rule("must not be empty", f"[{index}]" if len(inputs) > 1 else "")
    return inputs


class EmbeddingsRequest(Body):
    """``POST /v1/embeddings``."""

    token_ids: ClassVar[tuple[str, ...]] = ("input",)

    model: StrictStr = ""
    input: Annotated[
        Inputs,
        PlainValidator(
            _inputs,
            json_schema_input_type=StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]],
        ),
    ]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Whole | None = None
    pooling: Pooling = "mean"


def mount(app: FastAPI, service: Service) -> None:
    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingsRequest, request: fastapi.Request) -> Response:
        chosen = service.of(body.model)
        check_dimensions(chosen, body.dimensions)
        prompts = await asyncio.to_thread(lambda: [chosen.prompt_ids(one) for one in body.input])
        choices = await while_connected(request, embedded(chosen, prompts, body.pooling))
        counts = usage(choices, len(choices))
        answer = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": choice.index, "embedding": _encoded(body, choice)}
                for choice in choices
            ],
            "model": chosen.name,
            "usage": {"prompt_tokens": counts["prompt_tokens"], "total_tokens": counts["total_tokens"]},
        }
        return JSONResponse(answer)


def check_dimensions(service: Service, dimensions: int | None) -> None:
    """Raises ApiError for another number than the model has: the first ones alone mean nothing."""
    size = service.runner.engine.model.config.hidden_size
    if dimensions is not None and dimensions != size:
        text = f"dimensions: the embeddings of '{service.name}' have {size} and cannot be shortened"
        raise ApiError(400, text)


async def embedded(
    service: Service, prompts: Sequence[Sequence[int]], pooling: Pooling = "mean"
) -> list[Choice]:
    """The embeddings of prompts, one choice each. Raises ApiError for one that exceeds the context, and for
    too many tokens in all."""
    total = sum(map(len, prompts))
    if total > MOST_TOKENS:
        raise ApiError(400, f"input: {total} tokens are too many; the limit is {MOST_TOKENS}")
    requests = [
        Request(prompt_ids=ids, pooling=pooling, adapter=service.adapter, generate=False) for ids in prompts
    ]
    return await prompted(service, requests, "input")


async def prompted(service: Service, requests: Sequence[Request], field: str) -> list[Choice]:
    """Compute requests that generate nothing. ``field`` has their texts. Raises ApiError."""
    most = min(service.context, service.runner.engine.max_cache_tokens)
    for index, request in enumerate(requests):
        at, tokens = f"{field}[{index}]" if len(requests) > 1 else field, len(request.prompt_ids)
        if tokens > most:
            what = "context" if most == service.context else "key-value cache"
            text = f"{at}: {tokens} tokens exceed the {what} of {most}"
            raise ApiError(400, text, code="context_length_exceeded")
        try:
            service.runner.engine.check(request)
        except UserError as error:
            raise ApiError(400, f"{at}: {str(error).removeprefix('prompt_ids: ')}") from None
    choices = begun(requests, len(requests))
    with service.runner.admitted(requests, min(len(requests), service.runner.engine.max_batch)):
        await whole(service, choices)
    return choices


def _encoded(body: EmbeddingsRequest, choice: Choice) -> list[float] | str:
    """A list of numbers, or the base64 text of 32-bit floats."""
    values = choice.embedding
    assert values is not None
    if body.encoding_format == "float":
        return values
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
