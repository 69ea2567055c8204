"""A conversation with a model. It knows the engine and the messages, but no terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from xverse.chat.saved import Message
from xverse.config import UserError
from xverse.engine import Adapter, Engine, FinishReason, Request, SamplingParams
from xverse.engine.load import load_engine
from xverse.engine.sampling_params import CHAT
from xverse.tokenizer import encode_chat, input_limit


@dataclass
class Speed:
    """Of the last reply: its tokens, and seconds until the first one and until the last one."""

    tokens: int = 0
    first: float = 0.0
    last: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second after the first."""
        return (self.tokens - 1) / (self.last - self.first) if self.last > self.first else 0.0


class Session:
    """The messages so far, and replies to the next one. ``notify`` receives messages for the user."""

    def __init__(
        self,
        engine: Engine,
        sampling: SamplingParams,
        stop_ids: tuple[int, ...],
        notify: Callable[[str], None],
    ) -> None:
        self.engine = engine
        self.sampling = sampling
        self.stop_ids = stop_ids
        self.notify = notify
        self.ending = ""  # why the last reply ended early; for the line after it
        self.messages: list[Message] = []
        self.adapters: dict[str, Adapter] = {}
        self.adapter: str | None = None  # the name of the one that replies are computed with
        self.speed = Speed()

    @property
    def system(self) -> str:
        return self.messages[0]["content"] if self._starts_with_system() else ""

    @system.setter
    def system(self, text: str) -> None:
        turns = self.messages[self._starts_with_system() :]
        self.messages = [{"role": "system", "content": text}, *turns] if text else turns

    def reset(self) -> None:
        """Forget the turns; keep the system prompt."""
        self.messages = self.messages[: self._starts_with_system()]

    def reply(self, text: str) -> Generator[str, None, None]:
        """Yield the reply to ``text`` piece by piece; both become part of the conversation.

        After an interruption or ``close`` the reply is what was generated so far; if that is nothing, the
        turn is dropped. Raises UserError if the model fails.
        """
        yield from self._answer({"role": "user", "content": text})

    def undo(self) -> Message:
        """Take the last message and its reply out of the conversation; returns the message."""
        if not self.messages or self.messages[-1]["role"] == "system":
            raise UserError("no message to take back")
        *self.messages, question, _ = self.messages
        return question

    def retry(self) -> Generator[str, None, None]:
        """Answer the last message again. An interruption before the first piece keeps the old reply."""
        before = self.messages
        question = self.undo()
        try:
            yield from self._answer(question)
        finally:
            if len(self.messages) < len(before):
                self.messages = before

    def room(self, text: str) -> int:
        """The number of tokens of ``text`` from files. Raises UserError if one message cannot hold them."""
        config = self.engine.model.config
        count = len(self.engine.tokenizer.encode(text))
        limit = input_limit(
            self.sampling.max_new_tokens, config.context_length, config.max_tokenizer_truncation
        )
        most = limit * 7 // 8
        if count > most:
            raise UserError(f"{count} tokens are too many; a question leaves room for {most}")
        return count

    def _answer(self, question: Message) -> Generator[str, None, None]:
        config = self.engine.model.config
        prompt = encode_chat(
            self.engine.tokenizer,
            [*self.messages, question],
            max_new_tokens=self.sampling.max_new_tokens,
            max_positions=self.engine.context_length,
            truncation=config.max_tokenizer_truncation,
        )
        if prompt.dropped_rounds:
            self.notify(f"too long for the context: the oldest {prompt.dropped_rounds} rounds were left out")
        if prompt.cut_tokens:
            self.notify(f"too long for the context: {prompt.cut_tokens} tokens were cut from the end")
        reply: list[str] = []
        finished = False
        try:
            with contextlib.closing(self._generate(prompt.ids)) as pieces:
                for piece in pieces:
                    reply.append(piece)
                    yield piece
            finished = True
        finally:
            if finished or any(reply):
                self.messages += [question, {"role": "assistant", "content": "".join(reply)}]

    def complete(self, text: str) -> Generator[str, None, None]:
        """Yield the continuation of ``text``, as a base model generates it; the conversation stays as it is.

        A text that is too long for the context loses its beginning.
        """
        if not text:
            raise UserError("the text to complete is empty")
        config = self.engine.model.config
        ids = [*self.engine.tokenizer.prefix_ids, *self.engine.tokenizer.encode(text)]
        limit = input_limit(
            self.sampling.max_new_tokens, self.engine.context_length, config.max_tokenizer_truncation
        )
        if len(ids) > limit:
            self.notify(f"too long for the context: the first {len(ids) - limit} tokens were left out")
        yield from self._generate(ids[-limit:])

    def _generate(self, prompt_ids: list[int]) -> Generator[str, None, None]:
        adapter = None if self.adapter is None else self.adapters[self.adapter]
        request = Request(
            prompt_ids=prompt_ids, sampling=self.sampling, stop_ids=self.stop_ids, adapter=adapter
        )
        reason: FinishReason | None = None
        self.speed, self.ending, began = Speed(), "", time.monotonic()
        with contextlib.closing(self.engine.stream(request)) as events:
            for event in events:
                reason = event.finish_reason
                self.speed.last = time.monotonic() - began
                self.speed.first = self.speed.first or self.speed.last
                self.speed.tokens += 1
                if event.text:
                    yield event.text
                if event.error:
                    raise UserError(f"the reply failed: {event.error}")
        if reason == "length":
            self.ending = f"stopped at the length limit (max_new_tokens = {self.sampling.max_new_tokens})"

    def _starts_with_system(self) -> bool:
        return bool(self.messages) and self.messages[0]["role"] == "system"


def load_session(
    model: str,
    overrides: Mapping[str, Any],
    *,
    defaults: SamplingParams = CHAT,
    notify: Callable[[str], None],
    **settings: Any,
) -> Session:
    """A session with ``model``, loaded by ``load_engine``, which takes the other ``settings``; ``overrides``
    replace its sampling parameters. Of several adapters the first one is used at first."""
    loaded = load_engine(model, defaults=defaults, **settings)
    sampling = dataclasses.replace(loaded.sampling, **overrides)
    session = Session(loaded.engine, sampling, loaded.stop_ids, notify)
    session.adapters, session.adapter = loaded.adapters, next(iter(loaded.adapters), None)
    return session
