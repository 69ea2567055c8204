"""The web page at ``/``: its files, the settings that it shows, and the fitting of long conversations.

The page itself is in ``static/`` and runs in the browser. It generates text through the API's routes.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from pydantic import FailFast, Field, StrictInt, StrictStr

from xverse.engine.sampling_params import COMPLETION, PARAMS, Param
from xverse.serve.errors import ApiError
from xverse.serve.fields import Lenient
from xverse.serve.protocol import Message
from xverse.serve.service import Service

FOLDER = Path(__file__).with_name("static")
LEAST_ROOM = 256  # tokens for a reply, below which the oldest turns are left out
_KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}


class Turn(Lenient):
    role: Literal["system", "user", "assistant"]
    content: StrictStr


class FitRequest(Lenient):
    """``messages``: an optional system message, then user and assistant alternating. The last one is the
    message to answer, or the reply to continue."""

    messages: Annotated[list[Turn], FailFast(), Field(min_length=1, max_length=100_000)]
    max_tokens: StrictInt | None = None


@dataclass(frozen=True)
class _File:
    kind: str
    tag: str
    body: bytes
    packed: bytes | None  # gzip


def mount(app: FastAPI, service: Service, *, first: str = "chat") -> None:
    """Put the page at ``/`` of ``app``; ``first`` is the tab that opens."""
    files = {path.relative_to(FOLDER).as_posix(): _read(path) for path in FOLDER.rglob("*") if path.is_file()}

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return _answer(files["index.html"], request)

    @app.get("/page/settings", include_in_schema=False)
    async def settings() -> dict[str, Any]:
        return {
            "model": service.name,
            "context": service.context,
            "first": first,
            "params": controls(service),
        }

    @app.post("/page/fit", include_in_schema=False)
    async def fit(body: FitRequest) -> dict[str, Any]:
        return await asyncio.to_thread(fitting, service, body)

    @app.get("/page/{name:path}", include_in_schema=False)
    async def file(name: str, request: Request) -> Response:
        if name not in files:
            raise ApiError(404, f"/page/{name} does not exist", code="unknown_path")
        return _answer(files[name], request)


def fitting(service: Service, body: FitRequest) -> dict[str, int]:
    """What of a conversation fits into the context together with its reply.

    ``first``: index of the first message to send, the system message aside; ``tokens`` of the prompt;
    ``max_tokens`` for the reply. If the last turn alone is too long, the answer has only its length,
    ``too_long``, and the number of tokens that would fit, ``most``.
    """
    messages = list(body.messages)
    begun = messages[-1].role == "assistant"
    system = [messages.pop(0)] if messages[0].role == "system" else []
    starts = [index for index, message in enumerate(messages) if message.role == "user"]
    if not starts:
        raise ApiError(400, "messages: no message to answer")
    starts[0] = 0  # a greeting belongs to the first turn
    counts = [len(ids) for ids in service.tokenizer.encode_batch([each.content for each in messages])]
    limit = min(body.max_tokens or service.sampling.max_new_tokens, service.context - 1)
    most = service.context - (1 if begun else min(limit, LEAST_ROOM))
    around, between = _frame(service, system)
    kept, tokens = len(starts) - 1, around + sum(counts[starts[-1] :])
    while kept and tokens + between + sum(counts[starts[kept - 1] : starts[kept]]) <= most:
        kept -= 1
        tokens += between + sum(counts[starts[kept] : starts[kept + 1]])
    for start in starts[kept:] if tokens <= most else []:
        tokens = _tokens(service, [*system, *messages[start:]])
        if tokens <= most:
            room = min(limit, service.context - tokens)
            return {"first": start + len(system), "tokens": tokens, "max_tokens": room}
    return {"too_long": sum(counts[starts[-1] :]), "most": max(most - around, 0)}


def _frame(service: Service, system: list[Turn]) -> tuple[int, int]:
    """How many tokens a prompt has besides its messages: with one turn, and more for each further one."""
    word = len(service.tokenizer.encode("x"))
    user, reply = Turn(role="user", content="x"), Turn(role="assistant", content="x")
    more = _tokens(service, [user, reply, user]) - _tokens(service, [user])
    return _tokens(service, [*system, user]) - word, more - 2 * word


def _tokens(service: Service, turns: list[Turn]) -> int:
    """The length of the prompt that the API makes of the messages."""
    messages = [Message(role=turn.role, content=turn.content) for turn in turns]
    return len(service.chat_ids(messages, [], turns[-1].role == "assistant"))


def controls(service: Service) -> list[dict[str, Any]]:
    """The sampling parameters that the page sets, each with its texts, range and defaults."""
    return [_control(param, service) for param in PARAMS.values() if not param.api_only]


def _control(param: Param, service: Service) -> dict[str, Any]:
    """A sampling parameter as the page shows it. JSON has no infinity: such a slider ends at the context."""
    slider = [service.context - 1 if math.isinf(end) else end for end in param.slider or ()]
    return {
        "name": param.http,
        "kind": param.kind.__name__,
        "low": param.low,
        "high": param.high,
        "above": param.above,
        "slider": slider,
        "texts": {language: param.text(language) for language in ("en", "zh")},
        "chat": getattr(service.sampling, param.name),
        "generation": getattr(COMPLETION, param.name),
    }


def _read(path: Path) -> _File:
    body = path.read_bytes()
    kind = _KINDS.get(path.suffix, "text/plain")
    text = path.suffix != ".woff2"
    packed = gzip.compress(body, mtime=0) if text else None
    charset = "; charset=utf-8" if text else ""
    return _File(kind + charset, f'"{hashlib.sha256(body).hexdigest()[:20]}"', body, packed)


def _answer(file: _File, request: Request) -> Response:
    """The file, or 304 if the browser has it. Browsers ask each time, so that an update is complete."""
    headers = {"ETag": file.tag, "Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
    if file.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    body = file.body
    if file.packed and "gzip" in request.headers.get("accept-encoding", ""):
        body = file.packed
        headers["Content-Encoding"] = "gzip"
    return Response(body, media_type=file.kind, headers=headers)
