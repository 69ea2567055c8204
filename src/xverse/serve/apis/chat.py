"""``/v1/chat/completions`` of OpenAI's API."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import fastapi
from fastapi import FastAPI, Response

from xverse.engine import Event, Request, TokenLogprob
from xverse.serve.calls import CallParser, CallPiece, Content, collected
from xverse.serve.exchange import respond, while_connected
from xverse.serve.protocol import ChatRequest
from xverse.serve.replies import Choice, Reply, begun, logprob_entry, new_id, usage, whole
from xverse.serve.service import Service


def mount(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: fastapi.Request) -> Response:
        chosen = service.of(body.model)
        grammar = await while_connected(request, chosen.grammars.of(body))
        # In a thread, because tokenising a long text would block other requests.
        reply = ChatReply(chosen, body, await asyncio.to_thread(chosen.chat, body, grammar))
        return await respond(service, request, reply, body.stream)


class ChatReply(Reply):
    """The response to one ``/v1/chat/completions`` request."""

    def __init__(self, service: Service, body: ChatRequest, requests: Sequence[Request]) -> None:
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion"}
        if body.stream:
            head["object"] = "chat.completion.chunk"
        super().__init__(service, body, requests, 1, head)
        self._body = body
        self._parsers = [service.call_parser(body) for _ in requests]

    async def body(self) -> dict[str, Any]:
        choices = begun(self.requests, 1)
        await whole(self._service, choices)
        prompt_ids = self._prompt_ids()
        return {
            **self._head,
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage(choices, 1),
            **({} if prompt_ids is None else {"prompt_token_ids": prompt_ids}),
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        parser = self._parsers[choice.index]
        pieces = parser.push(choice.text) + parser.end(choice.cut)
        content, calls = collected(pieces)
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
        message["refusal"] = None
        if calls and self._body.former_names:
            message["function_call"] = calls[0]
        elif calls:
            message["tool_calls"] = [
                {"id": new_id("call"), "type": "function", "function": call} for call in calls
            ]
        one = {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": self._reason(choice.finish_reason, parser),
        }
        return {**one, "token_ids": choice.token_ids} if self._ids else one

    def _reason(self, reason: str | None, parser: CallParser) -> str | None:
        """A reply with calls ends because of them, unless the last one was cut off."""
        if not parser.calls or reason is None or parser.open:
            return reason
        return "function_call" if self._body.former_names else "tool_calls"

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        entries = [logprob_entry(self._service.tokenizer, token) for token in tokens]
        return {"content": entries, "refusal": None}

    def _opening(self, choice: Choice) -> dict[str, Any]:
        return self._delta(choice, {"role": "assistant", "content": "", "refusal": None})

    def _chunks(self, choice: Choice, event: Event) -> Iterator[dict[str, Any]]:
        parser = self._parsers[choice.index]
        pieces = parser.push(event.text)
        ended = event.finish_reason is not None
        if ended:
            pieces += parser.end(choice.cut)
        logprobs = self._logprobs(choice.new_logprobs()) if pieces or ended else None
        for piece in pieces:
            yield self._delta(choice, self._piece(piece), logprobs)
            logprobs = None
        if ended:
            yield self._delta(choice, {}, logprobs, self._reason(event.finish_reason, parser))

    def _piece(self, piece: Content | CallPiece) -> dict[str, Any]:
        if isinstance(piece, Content):
            return {"content": piece.text}
        function = {"arguments": piece.arguments}
        if piece.name is not None:
            function = {"name": piece.name, **function}
        if self._body.former_names:
            return {"function_call": function} if piece.index == 0 else {}
        begun = {} if piece.name is None else {"id": new_id("call"), "type": "function"}
        return {"tool_calls": [{"index": piece.index, **begun, "function": function}]}

    @staticmethod
    def _delta(
        choice: Choice,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
