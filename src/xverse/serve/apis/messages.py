"""``/v1/messages`` of Anthropic's API, and ``/v1/messages/count_tokens``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

import fastapi
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from xverse.serve.access_log import current
from xverse.serve.apis.message_blocks import FIELD_NAMES, CountRequest, MessagesRequest
from xverse.serve.apis.talk import Talk, talk
from xverse.serve.calls import CallPiece, Content, collected, read_arguments
from xverse.serve.exchange import respond
from xverse.serve.replies import failed, new_id, sse
from xverse.serve.service import Service
from xverse.serve.tools import offered_tools


def mount(app: FastAPI, service: Service) -> None:
    @app.post("/v1/messages")
    async def messages(body: MessagesRequest, request: fastapi.Request) -> Response:
        _check(body, request)
        chosen = service.of(body.model)
        reply = MessageReply(await talk(chosen, request, body.request(), FIELD_NAMES, clamp=True))
        headers = {"request-id": current().id}
        return await respond(service, request, reply, body.stream, headers=headers)

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountRequest, request: fastapi.Request) -> Response:
        _check(body, request)
        service.of(body.model)
        chat = body.chat()
        ids = await asyncio.to_thread(
            service.chat_ids, chat.messages, offered_tools(chat), chat.continue_final_message
        )
        return JSONResponse({"input_tokens": len(ids)})


def _check(body: CountRequest, request: fastapi.Request) -> None:
    body.check(request.headers.get("anthropic-version"), "anthropic-beta" in request.headers)


class MessageReply:
    """The response to one request."""

    def __init__(self, talk: Talk) -> None:
        self._talk, self.requests = talk, [talk.choice.request]
        self._head = {"id": new_id("msg"), "type": "message", "role": "assistant", "model": talk.service.name}
        self._index = -1  # of the last content block
        self._open = ""  # the type of the block that grows

    async def body(self) -> dict[str, Any]:
        async with aclosing(self._talk.pieces()) as stream:
            text, calls = collected([piece async for piece in stream])
        content: list[dict[str, Any]] = [{"type": "text", "text": text}] if text or not calls else []
        for call in calls:
            block = {"type": "tool_use", "id": new_id("toolu"), "name": call["name"]}
            arguments = read_arguments(call["arguments"])
            content.append({**block, "input": arguments if isinstance(arguments, dict) else {}})
        return {**self._head, "content": content, **self._stop(), "usage": self._usage()}

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        try:
            start: dict[str, Any] = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None}
            yield _data("message_start", message={**start, "usage": self._usage()})
            yield _data("ping")
            async with aclosing(self._talk.pieces()) as pieces:
                async for piece in pieces:
                    for event in self._take(piece):
                        yield event
            if self._index < 0:
                for event in self._begin({"type": "text", "text": ""}):
                    yield event
            for event in self._end():
                yield event
            yield _data("message_delta", delta=self._stop(), usage=self._usage())
            yield _data("message_stop")
        except Exception as error:
            yield _data("error", **failed(error))

    def _take(self, piece: Content | CallPiece) -> Iterator[bytes]:
        if isinstance(piece, Content):
            if self._open != "text":
                yield from self._begin({"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": piece.text})
            return
        if piece.name is not None:
            block = {"type": "tool_use", "id": new_id("toolu"), "name": piece.name, "input": {}}
            yield from self._begin(block)
        if piece.arguments:
            yield self._delta({"type": "input_json_delta", "partial_json": piece.arguments})

    def _begin(self, block: dict[str, Any]) -> Iterator[bytes]:
        yield from self._end()
        self._index, self._open = self._index + 1, block["type"]
        yield _data("content_block_start", index=self._index, content_block=block)

    def _end(self) -> Iterator[bytes]:
        if self._open:
            self._open = ""
            yield _data("content_block_stop", index=self._index)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _data("content_block_delta", index=self._index, delta=delta)

    def _stop(self) -> dict[str, Any]:
        talk = self._talk
        reason, sequence = "end_turn", None
        if talk.ending == "calls":
            reason = "tool_use"
        elif talk.ending == "length":
            reason = "model_context_window_exceeded" if talk.context_full else "max_tokens"
        elif talk.choice.stop_text is not None:
            reason, sequence = "stop_sequence", talk.choice.stop_text
        return {"stop_reason": reason, "stop_sequence": sequence}

    def _usage(self) -> dict[str, Any]:
        used = self._talk.usage()
        cached = used["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": used["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": used["completion_tokens"],
        }


def _data(kind: str, **fields: Any) -> bytes:
    return sse({"type": kind, **fields}, kind)
