"""``/v1/completions`` of OpenAI's API."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import fastapi
from fastapi import FastAPI, Response

from xverse.engine import Event, Request, TokenLogprob
from xverse.serve.exchange import respond, while_connected
from xverse.serve.protocol import CompletionRequest
from xverse.serve.replies import Choice, Reply, begun, usage, whole
from xverse.serve.service import Service


def mount(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: fastapi.Request) -> Response:
        chosen = service.of(body.model)
        grammar = await while_connected(request, chosen.grammars.of(body))
        reply = CompletionReply(chosen, body, await asyncio.to_thread(chosen.complete, body, grammar))
        return await respond(service, request, reply, body.stream)


class CompletionReply(Reply):
    """The response to one ``/v1/completions`` request."""

    def __init__(self, service: Service, body: CompletionRequest, requests: Sequence[Request]) -> None:
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion"}
        super().__init__(service, body, requests, len(requests) // (body.n or 1), head)
        self._body = body
        self._echoing: set[int] = set(range(len(requests))) if body.echo else set()

    async def body(self) -> dict[str, Any]:
        choices = begun(self.requests, self._prompts)
        await whole(self._service, choices)
        chosen = [self._choice(choice) for choice in choices]
        return {**self._head, "choices": chosen, "usage": usage(choices, self._prompts)}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        text = self._echoed(choice) + choice.text
        one = self._one(choice, text, self._logprobs(choice), choice.finish_reason)
        if self._ids:
            one |= {"token_ids": choice.token_ids, "prompt_token_ids": list(choice.request.prompt_ids)}
        return one

    def _echoed(self, choice: Choice) -> str:
        """The prompt, once."""
        if choice.index not in self._echoing:
            return ""
        self._echoing.remove(choice.index)
        return self._service.tokenizer.decode(choice.request.prompt_ids, skip_special=False)

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        """The log-probabilities that were not sent yet."""
        if self._body.logprobs is None:
            return None
        token_bytes = self._service.tokenizer.token_bytes

        def text(token: int) -> str:
            """Incomplete characters in OpenAI's notation, so that they stay distinguishable."""
            try:
                return token_bytes(token).decode()
            except UnicodeDecodeError:
                return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes(token))

        tokens: list[int] = []
        logprobs: list[TokenLogprob | None] = []
        if self._body.echo and not choice.sent:  # the first token has no log-probability
            tokens.append(choice.request.prompt_ids[0])
            logprobs.append(None)
        for token in [*choice.prompt_logprobs, *choice.logprobs][choice.sent :]:
            tokens.append(token.token_id)
            logprobs.append(token)
        choice.sent = len(choice.prompt_logprobs) + len(choice.logprobs)
        offsets = []
        for token_id in tokens:
            offsets.append(choice.offset)
            choice.offset += len(choice.characters.decode(token_bytes(token_id)))
        return {
            "tokens": [text(token_id) for token_id in tokens],
            "token_logprobs": [token and token.logprob for token in logprobs],
            "top_logprobs": [
                token and {text(token_id): value for token_id, value in token.top} for token in logprobs
            ],
            "text_offset": offsets,
        }

    def _one(
        self, choice: Choice, text: str, logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _chunks(self, choice: Choice, event: Event) -> Iterator[dict[str, Any]]:
        text = self._echoed(choice) + event.text
        logprobs = self._logprobs(choice)
        if text or logprobs or event.finish_reason is not None:
            yield self._one(choice, text, logprobs, event.finish_reason)
