"""A reply to one conversation, in pieces: what the APIs share that have a conversation in another form.

Such an API writes its request as a ``ChatRequest``, so that the same checks, tools, grammars and limits
apply, and sends the pieces as its own events. Errors get its names of fields through ``Record.field_names``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, Literal

import fastapi

from xverse.engine import Request
from xverse.serve.access_log import current
from xverse.serve.calls import CallParser, CallPiece, Content
from xverse.serve.exchange import while_connected
from xverse.serve.protocol import ChatRequest
from xverse.serve.replies import begun, events, usage
from xverse.serve.service import Service

# How a reply ended: by itself or at a stop text, at a limit, or with complete calls.
Ending = Literal["stop", "length", "calls"]


class Talk:
    """One reply, of which ``pieces`` is iterated once. ``parser`` finds the calls in it."""

    def __init__(self, service: Service, request: Request, parser: CallParser) -> None:
        self.service = service
        (self.choice,) = begun([request], 1)
        self._parser = parser

    async def pieces(self) -> AsyncGenerator[Content | CallPiece, None]:
        """Raises ApiError if the reply fails. Closing it cancels the reply."""
        async with aclosing(events(self.service, self.choice)) as stream:
            async for event in stream:
                found = self._parser.push(event.text)
                if event.finish_reason is not None:
                    found += self._parser.end(self.choice.cut)
                for piece in found:
                    yield piece

    @property
    def ending(self) -> Ending:
        """For a reply that has ended. A call that was cut off does not count."""
        if self._parser.calls and not self._parser.open:
            return "calls"
        return "length" if self.choice.finish_reason == "length" else "stop"

    @property
    def context_full(self) -> bool:
        """Whether the limit of a cut reply was the context's."""
        return len(self.choice.request.prompt_ids) + self.choice.tokens >= self.service.context

    def usage(self) -> dict[str, Any]:
        """Token counts so far, by OpenAI's names."""
        return usage([self.choice], 1)


async def talk(
    service: Service,
    request: fastapi.Request,
    chat: ChatRequest,
    field_names: Mapping[str, str],
    clamp: bool = False,
) -> Talk:
    """Begin a reply to ``chat``, for which the API's own request stands; ``field_names`` has its names for
    the fields of a chat request; ``clamp`` as in ``Service.chat``. Raises ApiError."""
    current().field_names = field_names
    grammar = await while_connected(request, service.grammars.of(chat))
    (only,) = await asyncio.to_thread(service.chat, chat, grammar, clamp)
    return Talk(service, only, service.call_parser(chat))
