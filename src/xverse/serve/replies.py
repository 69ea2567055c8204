"""Engine events as OpenAI's responses: complete, or as server-sent events."""

from __future__ import annotations

import asyncio
import codecs
import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from xverse.config import UserError
from xverse.engine import Event, Request, TokenLogprob
from xverse.serve import errors
from xverse.serve.access_log import current
from xverse.serve.errors import ApiError
from xverse.serve.grammar import Grammar, unsupported
from xverse.serve.protocol import Generation
from xverse.serve.runner import Busy, Draining
from xverse.serve.service import Service
from xverse.tokenizer import Tokenizer

_UTF8 = codecs.getincrementaldecoder("utf-8")


@dataclass
class Choice:
    """The state of one reply."""

    index: int
    request: Request
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    embedding: list[float] | None = None
    finish_reason: str | None = None
    stop_text: str | None = None  # the stop text that ended it
    ids_sent: int = 0
    sent: int = 0  # log-probabilities sent
    offset: int = 0  # characters of their tokens
    characters: codecs.IncrementalDecoder = field(default_factory=lambda: _UTF8(errors="replace"))

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    @property
    def cut(self) -> bool:
        """Whether a limit or a stop text ended the reply, perhaps within a call."""
        return self.finish_reason == "length" or self.stop_text is not None

    def new_logprobs(self) -> list[TokenLogprob]:
        """The log-probabilities that were not sent yet."""
        new, self.sent = self.logprobs[self.sent :], len(self.logprobs)
        return new

    def new_ids(self) -> list[int]:
        """The tokens that were not sent yet."""
        new, self.ids_sent = self.token_ids[self.ids_sent :], len(self.token_ids)
        return new


def new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex[:24]}"


def logprob_entry(tokenizer: Tokenizer, chosen: TokenLogprob) -> dict[str, Any]:
    """A token and its alternatives in OpenAI's form."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.token_bytes(token)
        return {
            "token": text.decode("utf-8", errors="replace"),
            "logprob": max(logprob, -9999.0),
            "bytes": list(text),
        }

    top = [entry(*alternative) for alternative in chosen.top]
    return {**entry(chosen.token_id, chosen.logprob), "top_logprobs": top}


async def events(service: Service, choice: Choice, begin: float | None = None) -> AsyncGenerator[Event, None]:
    """The events of a choice, which is updated with each. Raises ApiError if it fails. ``begin``: when the
    time limit began, if before."""
    begin = time.monotonic() if begin is None else begin
    meter = service.metrics.reply(choice.request)
    outcome = "cancelled"
    try:
        async with aclosing(service.runner.stream(choice.request)) as stream:
            while True:
                left = begin + service.timeout - time.monotonic()
                event = await asyncio.wait_for(anext(stream), max(left, 0.001))
                meter.event(event)
                if event.token_id is not None:
                    choice.token_ids.append(event.token_id)
                choice.cached_tokens = event.cached_tokens
                choice.text += event.text
                choice.prompt_logprobs += event.prompt_logprobs or []
                choice.embedding = event.embedding or choice.embedding
                if event.logprob is not None:
                    choice.logprobs.append(event.logprob)
                if event.error is not None:
                    constraint = choice.request.constraint
                    grammar = getattr(constraint, "inner", constraint)
                    if isinstance(grammar, Grammar) and grammar.failed:
                        raise unsupported(*grammar.origin, grammar.failed)
                    raise ApiError(500, event.error, code="generation_failed")
                choice.finish_reason, choice.stop_text = event.finish_reason, event.stop_text
                yield event
                if event.finish_reason is not None:
                    outcome = event.finish_reason
                    return
    except TimeoutError:
        outcome = "timeout"
        raise ApiError(
            504, f"the reply exceeded the time limit of {service.timeout:g} seconds", code="timeout"
        ) from None
    except (ApiError, UserError, Busy, Draining):
        outcome = "error"
        raise
    finally:
        meter.end(outcome)


def begun(requests: Sequence[Request], prompts: int) -> list[Choice]:
    """Choices for ``requests``, whose token counts appear in the access log."""
    choices = [Choice(index, request) for index, request in enumerate(requests)]
    current().usage = lambda: usage(choices, prompts)
    return choices


async def whole(service: Service, choices: Sequence[Choice]) -> None:
    """Run all choices to their ends, as many at once as the engine does. One that fails, or a disconnect,
    cancels the others."""
    slots, begin = asyncio.Semaphore(service.runner.engine.max_batch), time.monotonic()

    async def run(choice: Choice) -> None:
        async with slots, aclosing(events(service, choice, begin)) as stream:
            async for _ in stream:
                pass

    try:
        async with asyncio.TaskGroup() as group:
            for choice in choices:
                group.create_task(run(choice))
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None


async def merged(service: Service, choices: Sequence[Choice]) -> AsyncGenerator[tuple[Choice, Event], None]:
    """The events of several choices in order of arrival."""
    arrived: asyncio.Queue[tuple[Choice, Event] | Exception | None] = asyncio.Queue(maxsize=64)

    async def run(choice: Choice) -> None:
        try:
            async with aclosing(events(service, choice)) as stream:
                async for event in stream:
                    await arrived.put((choice, event))
            await arrived.put(None)
        except Exception as error:
            await arrived.put(error)

    tasks = [asyncio.create_task(run(choice)) for choice in choices]
    try:
        left = len(tasks)
        while left:
            item = await arrived.get()
            if item is None:
                left -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def usage(choices: Sequence[Choice], prompts: int) -> dict[str, Any]:
    """Token counts. ``prompts``: how many different prompts the choices have; each counts once."""
    firsts = choices[:: max(1, len(choices) // max(1, prompts))]
    prompt = sum(len(choice.request.prompt_ids) for choice in firsts)
    completion = sum(choice.tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in firsts)},
    }


class Reply:
    """What both endpoints have in common. ``prompts`` is the number of different prompts."""

    def __init__(
        self,
        service: Service,
        body: Generation,
        requests: Sequence[Request],
        prompts: int,
        head: dict[str, Any],
    ) -> None:
        self._service, self._options, self._prompts = service, body.stream_options, prompts
        self._ids, self.requests = body.return_token_ids, requests
        self._head = {
            **head,
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": service.fingerprint,
        }

    def _usage_now(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """In every chunk, where the client asks for it; null where it asks for the usage at the end."""
        if self._options.continuous_usage_stats:
            return {"usage": usage(choices, self._prompts)}
        return {"usage": None} if self._options.include_usage else {}

    def _prompt_ids(self) -> list[int] | None:
        return list(self.requests[0].prompt_ids) if self._ids else None

    def _chunks(self, choice: Choice, event: Event) -> Iterator[dict[str, Any]]:
        """The choices of the chunks for one event."""
        raise NotImplementedError

    def _opening(self, choice: Choice) -> dict[str, Any] | None:
        """The choice of a first chunk."""
        return None

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        choices = begun(self.requests, self._prompts)
        prompt_ids = self._prompt_ids()
        head = self._head if prompt_ids is None else {**self._head, "prompt_token_ids": prompt_ids}
        try:
            for choice in choices:
                if (opening := self._opening(choice)) is not None:
                    yield sse({**head, "choices": [opening], **self._usage_now(choices)})
                    head = self._head
            async with aclosing(merged(self._service, choices)) as stream:
                async for choice, event in stream:
                    for one in self._chunks(choice, event):
                        if self._ids:
                            one["token_ids"] = choice.new_ids()
                        yield sse({**head, "choices": [one], **self._usage_now(choices)})
                        head = self._head
            if self._options.include_usage:
                yield sse({**self._head, "choices": [], "usage": usage(choices, self._prompts)})
        except Exception as error:
            yield sse(failed(error))
            return
        yield b"data: [DONE]\n\n"


def sse(value: dict[str, Any], event: str = "") -> bytes:
    """A server-sent event."""
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def failed(error: Exception) -> dict[str, Any]:
    """The body of an error that ends a stream after its status line was sent."""
    known = errors.as_api_error(error)
    return errors.body(known.status, str(known), known.param, known.code)
