"""``/v1/responses`` of OpenAI's API: replies as items, stored for requests that continue them."""

from __future__ import annotations

import asyncio
import bisect
import copy
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

import fastapi
from fastapi import FastAPI, Query, Response

from xverse.serve.access_log import current
from xverse.serve.apis.response_items import (
    FIELD_NAMES,
    Item,
    ReferenceItem,
    ResponsesRequest,
    messages_of,
    read_stored,
)
from xverse.serve.apis.response_store import ResponseStore, Stored
from xverse.serve.apis.talk import Talk, talk
from xverse.serve.calls import CallPiece, Content
from xverse.serve.errors import ApiError
from xverse.serve.exchange import page_of, respond
from xverse.serve.protocol import Message, ToolChoice
from xverse.serve.replies import failed, logprob_entry, new_id, sse
from xverse.serve.service import Service
from xverse.serve.tools import offered_tools

Order = Literal["asc", "desc"]


def mount(app: FastAPI, service: Service) -> None:
    store = ResponseStore()

    @app.post("/v1/responses")
    async def responses(body: ResponsesRequest, request: fastapi.Request) -> Response:
        reply = await _begin(service, store, body, request)
        return await respond(service, request, reply, body.stream)

    @app.get("/v1/responses/{name}")
    async def retrieve(name: str) -> dict[str, Any]:
        return _stored(store, name).response

    @app.delete("/v1/responses/{name}")
    async def delete(name: str) -> dict[str, Any]:
        _stored(store, name)
        store.delete(name, current().key)
        return {"id": name, "object": "response", "deleted": True}

    @app.post("/v1/responses/{name}/cancel")
    async def cancel(name: str) -> None:
        _stored(store, name)
        raise ApiError(400, "only responses computed in the background can be cancelled", param="response_id")

    @app.get("/v1/responses/{name}/input_items")
    async def input_items(
        name: str, limit: Annotated[int, Query(ge=1, le=100)] = 20, order: Order = "desc", after: str = ""
    ) -> dict[str, Any]:
        items = _stored(store, name).input
        return page_of(items[::-1] if order == "desc" else items, limit, after)


def _stored(store: ResponseStore, name: str, param: str = "response_id") -> Stored:
    found = store.get(name, current().key)
    if found is None:
        text = f"{param}: the response '{name[:80]}' does not exist, or is not kept any more"
        code = "previous_response_not_found" if param == "previous_response_id" else "response_not_found"
        raise ApiError(404, text, param=param, code=code)
    return found


async def _begin(
    service: Service, store: ResponseStore, body: ResponsesRequest, request: fastapi.Request
) -> ResponseReply:
    body.check()
    service = service.of(body.model)
    earlier: list[dict[str, Any]] = []
    if body.previous_response_id:
        earlier = _stored(store, body.previous_response_id, "previous_response_id").conversation
    items = [_resolved(store, item, index) for index, item in enumerate(body.input)]
    messages = messages_of(body.instructions, [*map(read_stored, earlier), *items])
    if body.truncation == "auto":
        messages = await asyncio.to_thread(_fitting, service, body, messages)
    begun = await talk(service, request, body.chat(messages), FIELD_NAMES)
    return ResponseReply(body, begun, store, earlier, [item.stored() for item in items])


def _resolved(store: ResponseStore, item: Item, index: int) -> Any:
    """The item itself, or the one that it refers to."""
    if not isinstance(item, ReferenceItem):
        return item
    found = store.item(item.id, current().key)
    if found is None:
        text = f"input[{index}].id: the item '{item.id[:80]}' does not exist, or is not kept any more"
        raise ApiError(404, text)
    return read_stored(found)


def _fitting(service: Service, body: ResponsesRequest, messages: list[Message]) -> list[Message]:
    """Without the oldest messages that leave no room for the reply; instructions and the last one stay."""
    chat = body.chat(messages)
    offered = offered_tools(chat)
    limit = chat.sampling().get("max_new_tokens") or 1
    kept = [message for message in messages[:1] if body.instructions and message.role == "system"]
    others = messages[len(kept) :]

    def fits(dropped: int) -> bool:
        ids = service.chat_ids([*kept, *others[dropped:]], offered, False)
        return len(ids) + limit <= service.context

    dropped = bisect.bisect_left(range(len(others) - 1), True, key=fits)
    return [*kept, *others[dropped:]]


class ResponseReply:
    """The response to one request. Streamed or not, it grows by the same events."""

    def __init__(
        self,
        body: ResponsesRequest,
        talk: Talk,
        store: ResponseStore,
        earlier: list[dict[str, Any]],
        input: list[dict[str, Any]],
    ) -> None:
        self._request, self._talk, self._store = body, talk, store
        self.requests = [talk.choice.request]
        self._earlier, self._input = earlier, input
        self._output: list[dict[str, Any]] = []
        self._open = False  # whether the last item grows
        self._events = 0
        self._id, self._created = new_id("resp"), time.time()

    async def body(self) -> dict[str, Any]:
        final: dict[str, Any] = {}
        async with aclosing(self._all()) as events:
            async for event in events:
                final = event
        return final["response"]

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(self._all()) as events:
                async for event in events:
                    yield sse(event, event["type"])
        except Exception as error:
            wrong = failed(error)["error"]
            code = wrong["code"] if wrong["code"] in _ERROR_CODES else "server_error"
            reason = {"code": code, "message": wrong["message"]}
            event = self._event("response.failed", response=self._response("failed", error=reason))
            yield sse(event, event["type"])

    async def _all(self) -> AsyncGenerator[dict[str, Any], None]:
        """The events; the last one has the whole response."""
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        async with aclosing(self._talk.pieces()) as pieces:
            async for piece in pieces:
                for event in self._take(piece):
                    yield event
        if not self._output:
            for event in self._message():
                yield event
        cut = self._talk.ending == "length"
        for event in self._close("incomplete" if cut else "completed"):
            yield event
        response = self._finished(cut)
        if self._request.store:
            self._store.put(response, self._input, [*self._earlier, *self._input], current().key)
        yield self._event(f"response.{response['status']}", response=response)

    def _finished(self, cut: bool) -> dict[str, Any]:
        used = self._talk.usage()
        details = {"cached_tokens": used["prompt_tokens_details"]["cached_tokens"], "cache_write_tokens": 0}
        usage = {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": details,
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used["total_tokens"],
        }
        if cut:
            return self._response("incomplete", usage=usage, incomplete={"reason": "max_output_tokens"})
        return self._response("completed", usage=usage)

    def _take(self, piece: Content | CallPiece) -> Iterator[dict[str, Any]]:
        if isinstance(piece, Content):
            if not self._open or self._output[-1]["type"] != "message":
                yield from self._message()
            item = self._output[-1]
            part = item["content"][0]
            part["text"] += piece.text
            logprobs = []
            if self._request.logprobs:
                tokenizer = self._talk.service.tokenizer
                logprobs = [logprob_entry(tokenizer, token) for token in self._talk.choice.new_logprobs()]
                part["logprobs"] += logprobs
            yield self._of_part("response.output_text.delta", item, delta=piece.text, logprobs=logprobs)
            return
        if piece.name is not None:
            call = {"type": "function_call", "call_id": new_id("call"), "name": piece.name, "arguments": ""}
            yield from self._begin({"id": new_id("fc"), **call, "status": "in_progress"})
        item = self._output[-1]
        if piece.arguments:
            item["arguments"] += piece.arguments
            yield self._of_item("response.function_call_arguments.delta", item, delta=piece.arguments)

    def _message(self) -> Iterator[dict[str, Any]]:
        item: dict[str, Any] = {"id": new_id("msg"), "type": "message", "role": "assistant", "content": []}
        yield from self._begin(item | {"status": "in_progress"})
        item = self._output[-1]
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["content"].append(part)
        yield self._of_part("response.content_part.added", item, part=part)

    def _begin(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._close("completed")
        self._output.append(item)
        self._open = True
        yield self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        """End the last item."""
        if not self._open:
            return
        self._open, item = False, self._output[-1]
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            yield self._of_part(
                "response.output_text.done", item, text=part["text"], logprobs=part["logprobs"]
            )
            yield self._of_part("response.content_part.done", item, part=part)
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._of_item("response.function_call_arguments.done", item, **done)
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _of_part(self, kind: str, item: dict[str, Any], **more: Any) -> dict[str, Any]:
        return self._of_item(kind, item, content_index=0, **more)

    def _of_item(self, kind: str, item: dict[str, Any], **more: Any) -> dict[str, Any]:
        return self._event(kind, item_id=item["id"], output_index=len(self._output) - 1, **more)

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        self._events += 1
        return {"type": kind, "sequence_number": self._events - 1, **more}

    def _response(
        self,
        status: str,
        *,
        usage: dict[str, Any] | None = None,
        incomplete: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        body, sampling = self._request, self._talk.choice.request.sampling
        form = body.text.format.model_dump(by_alias=True, exclude_unset=True)
        return {
            "id": self._id,
            "object": "response",
            "created_at": int(self._created),
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": error,
            "incomplete_details": incomplete,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata,
            "model": self._talk.service.name,
            "output": copy.deepcopy(self._output),
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": body.store,
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text", **form}},
            "tool_choice": _choice(body.tool_choice),
            "tools": [_tool(tool) for tool in body.tools],
            "top_logprobs": body.top_logprobs,
            "top_p": sampling.top_p,
            "truncation": body.truncation,
            "usage": usage,
            "user": body.user,
        }


_ERROR_CODES = ("server_error", "rate_limit_exceeded", "invalid_prompt")  # those of the API


def _choice(choice: ToolChoice | None) -> Any:
    if choice is None:
        return "auto"
    if choice.names is None:
        return choice.mode
    tools = [{"type": "function", "name": name} for name in choice.names]
    if choice.mode == "required" and len(tools) == 1:
        return tools[0]
    return {"type": "allowed_tools", "mode": choice.mode, "tools": tools}


def _tool(tool: Any) -> dict[str, Any]:
    return {"description": None, "strict": False, **tool.model_dump(exclude_none=True)}
