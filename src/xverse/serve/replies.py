"""Engine events as OpenAI's responses: complete, or as server-sent events."""

from __future__ import annotations

import asyncio
import codecs
import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from xverse.config import UserError
from xverse.engine import Event, Request, TokenLogprob
from xverse.serve import errors, tools
from xverse.serve.access_log import current
from xverse.serve.errors import ApiError
from xverse.serve.grammar import Grammar
from xverse.serve.protocol import ChatRequest, CompletionRequest
from xverse.serve.runner import Busy, Draining
from xverse.serve.service import Service

_UTF8 = codecs.getincrementaldecoder("utf-8")


@dataclass
class Choice:
    """The state of one reply."""

    index: int
    request: Request
    text: str = ""
    tokens: int = 0
    cached_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    streamed: int = 0  # characters sent
    sent: int = 0  # log-probabilities sent
    offset: int = 0  # characters of their tokens
    characters: codecs.IncrementalDecoder = field(default_factory=lambda: _UTF8(errors="replace"))


async def events(service: Service, choice: Choice) -> AsyncGenerator[Event, None]:
    """The events of a choice, which is updated with each. Raises ApiError if it fails."""
    begin, meter = time.monotonic(), service.metrics.reply(choice.request)
    outcome = "cancelled"
    try:
        async with aclosing(service.runner.stream(choice.request)) as stream:
            while True:
                left = begin + service.timeout - time.monotonic()
                event = await asyncio.wait_for(anext(stream), max(left, 0.001))
                meter.event(event)
                choice.tokens += event.token_id is not None
                choice.cached_tokens = event.cached_tokens
                choice.text += event.text
                choice.prompt_logprobs += event.prompt_logprobs or []
                if event.logprob is not None:
                    choice.logprobs.append(event.logprob)
                if event.error is not None:
                    grammar = choice.request.constraint
                    if isinstance(grammar, Grammar) and grammar.failed:
                        text = f"response_format: the schema is not supported: {grammar.failed}"
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
        meter.end(outcome)


def begun(requests: Sequence[Request], prompts: int) -> list[Choice]:
    """Choices for ``requests``, whose token counts appear in the access log."""
    choices = [Choice(index, request) for index, request in enumerate(requests)]
    current().usage = lambda: usage(choices, prompts)
    return choices


async def whole(service: Service, choices: Sequence[Choice]) -> None:
    """Run all choices to their ends. One that fails, or a disconnect, cancels the others."""

    async def run(choice: Choice) -> None:
        async with aclosing(events(service, choice)) as stream:
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


class ChatReply:
    """The response to one ``/v1/chat/completions`` request."""

    def __init__(self, service: Service, body: ChatRequest, requests: Sequence[Request]) -> None:
        self._service, self._body, self._requests = service, body, requests
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.name,
        }

    async def body(self) -> dict[str, Any]:
        choices = begun(self._requests, 1)
        await whole(self._service, choices)
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage(choices, 1),
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        content, calls = tools.parse(choice.text, self._body)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if calls:
            message["tool_calls"] = calls
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": "tool_calls" if calls else choice.finish_reason,
        }

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

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        choices = begun(self._requests, 1)
        calling = bool(tools.offered_tools(self._body))
        try:
            for choice in choices:
                yield self._chunk(choice, {"role": "assistant", "content": ""})
            async with aclosing(merged(self._service, choices)) as stream:
                async for choice, event in stream:
                    ended = event.finish_reason is not None
                    delta: dict[str, Any] = {}
                    reason: str | None = event.finish_reason
                    until = tools.certain(choice.text) if calling else len(choice.text)
                    if ended and calling:
                        _, calls = tools.parse(choice.text, self._body)
                        if calls:
                            reason = "tool_calls"
                            delta["tool_calls"] = [{"index": n, **call} for n, call in enumerate(calls)]
                        else:
                            until = len(choice.text)
                    if until > choice.streamed:
                        delta["content"] = choice.text[choice.streamed : until]
                        choice.streamed = until
                    logprobs = None
                    if delta or ended:
                        logprobs = self._logprobs(choice.logprobs[choice.sent :])
                        choice.sent = len(choice.logprobs)
                    if delta:
                        yield self._chunk(choice, delta, logprobs)
                        logprobs = None
                    if ended:
                        yield self._chunk(choice, {}, logprobs, reason)
            if self._body.stream_options is not None and self._body.stream_options.include_usage:
                yield _data({**self._chunk_head(), "choices": [], "usage": usage(choices, 1)})
        except Exception as error:
            yield _failure(error)
            return
        yield b"data: [DONE]\n\n"

    def _chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"}

    def _chunk(
        self,
        choice: Choice,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> bytes:
        one = {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return _data({**self._chunk_head(), "choices": [one]})


class CompletionReply:
    """The response to one ``/v1/completions`` request."""

    def __init__(self, service: Service, body: CompletionRequest, requests: Sequence[Request]) -> None:
        self._service, self._body, self._requests = service, body, requests
        self._prompts = len(requests) // (body.n or 1)
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
        }

    async def body(self) -> dict[str, Any]:
        choices = begun(self._requests, self._prompts)
        await whole(self._service, choices)
        used = usage(choices, self._prompts)
        return {**self._head, "choices": [self._choice(choice) for choice in choices], "usage": used}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        text = self._echoed(choice) + choice.text
        return self._one(choice, text, self._logprobs(choice), choice.finish_reason)

    def _echoed(self, choice: Choice) -> str:
        if not self._body.echo:
            return ""
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

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        choices = begun(self._requests, self._prompts)
        echoed: set[int] = set()
        try:
            async with aclosing(merged(self._service, choices)) as stream:
                async for choice, event in stream:
                    text = event.text
                    if self._body.echo and choice.index not in echoed:
                        text = self._echoed(choice) + text
                    echoed.add(choice.index)
                    logprobs = self._logprobs(choice)
                    if text or logprobs or event.finish_reason is not None:
                        one = self._one(choice, text, logprobs, event.finish_reason)
                        yield _data({**self._head, "choices": [one]})
            if self._body.stream_options is not None and self._body.stream_options.include_usage:
                yield _data({**self._head, "choices": [], "usage": usage(choices, self._prompts)})
        except Exception as error:
            yield _failure(error)
            return
        yield b"data: [DONE]\n\n"


def _data(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def _failure(error: Exception) -> bytes:
    """The last event of a stream that failed after its status line was sent."""
    if isinstance(error, ApiError):
        failed = (error.status, str(error), error.param, error.code)
    elif isinstance(error, Busy):
        failed = (429, str(error), None, "queue_full")
    elif isinstance(error, Draining):
        failed = (503, str(error), None, "shutting_down")
    elif isinstance(error, UserError):
        failed = (400, str(error), None, None)
    else:
        failed = (500, f"{type(error).__name__}: {error}", None, None)
    return _data(errors.body(*failed))
