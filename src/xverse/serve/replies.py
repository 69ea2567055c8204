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
from xverse.serve.calls import CallParser, CallPiece, Content
from xverse.serve.errors import ApiError
from xverse.serve.protocol import ChatRequest, CompletionRequest, Generation
from xverse.serve.runner import Busy, Draining
from xverse.serve.service import Service

_UTF8 = codecs.getincrementaldecoder("utf-8")


@dataclass
class Choice:
    """The state of one reply."""

    index: int
    request: Request
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cached: int = 0  # tokens of the prompt
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    ids_sent: int = 0
    sent: int = 0  # log-probabilities sent
    offset: int = 0  # characters of their tokens
    characters: codecs.IncrementalDecoder = field(default_factory=lambda: _UTF8(errors="replace"))

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    def new_ids(self) -> list[int]:
        """The tokens that were not sent yet."""
        new, self.ids_sent = self.token_ids[self.ids_sent :], len(self.token_ids)
        return new


async def events(service: Service, endpoint: str, choice: Choice) -> AsyncGenerator[Event, None]:
    """The events of a choice, which is updated with each. Raises ApiError if it fails."""
    begin = last = time.monotonic()
    outcome = "cancelled"
    try:
        async with aclosing(service.runner.stream(choice.request)) as stream:
            while True:
                left = begin + service.timeout - time.monotonic()
                event = await asyncio.wait_for(anext(stream), max(left, 0.001))
                now = time.monotonic()
                if event.token_id is not None:
                    (
                        service.metrics.between_tokens if choice.tokens else service.metrics.first_token
                    ).observe(now - last)
                    last = now
                    choice.token_ids.append(event.token_id)
                    choice.cached = event.cached_tokens
                choice.text += event.text
                choice.prompt_logprobs += event.prompt_logprobs or []
                if event.logprob is not None:
                    choice.logprobs.append(event.logprob)
                if event.error is not None:
                    constraint = choice.request.constraint
                    failed = getattr(getattr(constraint, "inner", constraint), "failed", "")
                    if failed:
                        text = f"response_format: the schema is not supported: {failed}"
                        raise ApiError(400, text, param="response_format", code="bad_schema")
                    raise ApiError(500, event.error, code="generation_failed")
                choice.finish_reason = event.finish_reason
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
        service.metrics.requests.labels(endpoint, outcome).inc()


async def whole(service: Service, endpoint: str, requests: Sequence[Request]) -> list[Choice]:
    """Run all choices to their ends. One that fails, or a disconnect, cancels the others."""
    choices = [Choice(index, request) for index, request in enumerate(requests)]

    async def run(choice: Choice) -> None:
        async with aclosing(events(service, endpoint, choice)) as stream:
            async for _ in stream:
                pass

    try:
        async with asyncio.TaskGroup() as group:
            for choice in choices:
                group.create_task(run(choice))
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return choices


async def merged(
    service: Service, endpoint: str, choices: Sequence[Choice]
) -> AsyncGenerator[tuple[Choice, Event], None]:
    """The events of several choices in order of arrival."""
    arrived: asyncio.Queue[tuple[Choice, Event] | Exception | None] = asyncio.Queue(maxsize=64)

    async def run(choice: Choice) -> None:
        try:
            async with aclosing(events(service, endpoint, choice)) as stream:
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
    first = choices[:: max(1, len(choices) // max(1, prompts))]
    prompt = sum(len(choice.request.prompt_ids) for choice in first)
    completion = sum(choice.tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(choice.cached for choice in first)},
    }


class _Reply:
    """What both endpoints have in common. ``prompts`` is the number of different prompts."""

    endpoint = ""

    def __init__(
        self,
        service: Service,
        body: Generation,
        requests: Sequence[Request],
        prompts: int,
        head: dict[str, Any],
    ) -> None:
        self._service, self._options, self._prompts = service, body.stream_options, prompts
        self._ids, self._requests = body.return_token_ids, requests
        self._head = {
            **head,
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": service.fingerprint,
        }

    def _count(self) -> None:
        prompts = self._requests[:: max(1, len(self._requests) // self._prompts)]
        self._service.metrics.prompt_tokens.inc(sum(len(request.prompt_ids) for request in prompts))

    def _usage_now(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """In every chunk, where the client asks for it."""
        return {"usage": usage(choices, self._prompts)} if self._options.continuous_usage_stats else {}

    def _prompt_ids(self) -> list[int] | None:
        return list(self._requests[0].prompt_ids) if self._ids else None

    def _chunks(self, choice: Choice, event: Event) -> Iterator[dict[str, Any]]:
        """The choices of the chunks for one event."""
        raise NotImplementedError

    def _opening(self, choice: Choice) -> dict[str, Any] | None:
        """The choice of a first chunk."""
        return None

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        choices = [Choice(index, request) for index, request in enumerate(self._requests)]
        self._count()
        prompt_ids = self._prompt_ids()
        head = self._head if prompt_ids is None else {**self._head, "prompt_token_ids": prompt_ids}
        try:
            for choice in choices:
                if (opening := self._opening(choice)) is not None:
                    yield _data({**head, "choices": [opening], **self._usage_now(choices)})
                    head = self._head
            async with aclosing(merged(self._service, self.endpoint, choices)) as stream:
                async for choice, event in stream:
                    for one in self._chunks(choice, event):
                        if self._ids:
                            one["token_ids"] = choice.new_ids()
                        yield _data({**head, "choices": [one], **self._usage_now(choices)})
                        head = self._head
            if self._options.include_usage:
                yield _data({**self._head, "choices": [], "usage": usage(choices, self._prompts)})
        except Exception as error:
            yield _failure(error)
            return
        yield b"data: [DONE]\n\n"


class ChatReply(_Reply):
    """The response to one ``/v1/chat/completions`` request."""

    endpoint = "chat"

    def __init__(self, service: Service, body: ChatRequest, requests: Sequence[Request]) -> None:
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion"}
        if body.stream:
            head["object"] = "chat.completion.chunk"
        super().__init__(service, body, requests, 1, head)
        self._body = body
        self._parsers = [service.call_parser(body) for _ in requests]

    async def body(self) -> dict[str, Any]:
        self._count()
        choices = await whole(self._service, self.endpoint, self._requests)
        prompt_ids = self._prompt_ids()
        return {
            **self._head,
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage(choices, 1),
            **({} if prompt_ids is None else {"prompt_token_ids": prompt_ids}),
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        parser = self._parsers[choice.index]
        pieces = parser.push(choice.text) + parser.end(choice.finish_reason == "length")
        content, calls = "", list[dict[str, Any]]()
        for piece in pieces:
            if isinstance(piece, Content):
                content += piece.text
            elif piece.name is not None:
                calls.append({"name": piece.name, "arguments": piece.arguments})
            else:
                calls[-1]["arguments"] += piece.arguments
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
        message["refusal"] = None
        if calls and self._body.former_names:
            message["function_call"] = calls[0]
        elif calls:
            message["tool_calls"] = [
                {"id": _call_id(), "type": "function", "function": call} for call in calls
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
        if not parser.calls or reason is None or (reason == "length" and parser.open):
            return reason
        return "function_call" if self._body.former_names else "tool_calls"

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return {"content": [self._token(token) for token in tokens], "refusal": None}

    def _token(self, chosen: TokenLogprob) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self._service.tokenizer.token_bytes(token)
            return {
                "token": text.decode("utf-8", errors="replace"),
                "logprob": max(logprob, -9999.0),
                "bytes": list(text),
            }

        top = [entry(*alternative) for alternative in chosen.top]
        return {**entry(chosen.token_id, chosen.logprob), "top_logprobs": top}

    def _opening(self, choice: Choice) -> dict[str, Any]:
        return self._delta(choice, {"role": "assistant", "content": "", "refusal": None})

    def _chunks(self, choice: Choice, event: Event) -> Iterator[dict[str, Any]]:
        parser = self._parsers[choice.index]
        pieces = parser.push(event.text)
        ended = event.finish_reason is not None
        if ended:
            pieces += parser.end(event.finish_reason == "length")
        logprobs = None
        if pieces or ended:
            logprobs = self._logprobs(choice.logprobs[choice.sent :])
            choice.sent = len(choice.logprobs)
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
        begun = {} if piece.name is None else {"id": _call_id(), "type": "function"}
        return {"tool_calls": [{"index": piece.index, **begun, "function": function}]}

    @staticmethod
    def _delta(
        choice: Choice,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class CompletionReply(_Reply):
    """The response to one ``/v1/completions`` request."""

    endpoint = "completions"

    def __init__(self, service: Service, body: CompletionRequest, requests: Sequence[Request]) -> None:
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion"}
        super().__init__(service, body, requests, len(requests) // (body.n or 1), head)
        self._body = body
        self._echoing: set[int] = set(range(len(requests))) if body.echo else set()

    async def body(self) -> dict[str, Any]:
        self._count()
        choices = await whole(self._service, self.endpoint, self._requests)
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


def _data(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def _failure(error: Exception) -> bytes:
    """The last event of a stream that failed after its status line was sent."""
    if isinstance(error, ApiError):
        return _data(errors.body(error.status, str(error), error.param, error.code))
    if isinstance(error, Busy):
        return _data(errors.body(429, str(error), code="queue_full"))
    if isinstance(error, Draining):
        return _data(errors.body(503, str(error), code="shutting_down"))
    if isinstance(error, UserError):
        return _data(errors.body(400, str(error)))
    return _data(errors.body(500, f"{type(error).__name__}: {error}"))
