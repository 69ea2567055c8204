"""JSON bodies: what is not JSON is refused; no text has half a surrogate pair, which UTF-8 cannot write."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from xverse.tokenizer.tokenizer import replace_surrogates

_HALVES = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")  # as escapes, and as they are


def read(body: bytes) -> Any:
    """The value of a body. Raises JSONDecodeError, or another ValueError or a RecursionError for
    what the decoder cannot read."""

    def number(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise json.JSONDecodeError(f"{text[:40]} is not a number of JSON, or too large", "", 0)
        return value

    text = body.decode(json.detect_encoding(body), "surrogatepass")
    value = json.loads(text, parse_constant=number, parse_float=number)
    return encodable(value) if _HALVES.search(text) else value


def encodable(value: Any) -> Any:
    """The value with U+FFFD in place of halves of surrogate pairs, as JavaScript clients write cut emoji."""
    text = json.dumps(value, ensure_ascii=False)
    clean = replace_surrogates(text)
    return value if clean is text else json.loads(clean)


class _Request(Request):
    async def json(self) -> Any:
        return read(await self.body())


class Route(APIRoute):
    """A route whose JSON body is read by ``read``."""

    def get_route_handler(self) -> Callable[..., Any]:
        handle = super().get_route_handler()

        async def with_body(request: Request) -> Response:
            response: Response = await handle(_Request(request.scope, request.receive))
            return response

        return with_body
