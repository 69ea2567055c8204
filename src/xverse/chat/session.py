"""A conversation with a model: it knows the engine and the messages, and nothing of terminals."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import Any

from xverse.chat.conversation import Message
from xverse.config import UserError
from xverse.engine import Engine, FinishReason
from xverse.engine.load import CHAT, Parameters, load_engine
from xverse.tokenizer import encode_chat, input_limit


class Session:
    """Messages so far, and replies to the next one. ``notify`` is told what the user should know."""

    def __init__(
        self,
        engine: Engine,
        parameters: Parameters,
        stop_ids: tuple[int, ...],
        notify: Callable[[str], None],
    ) -> None:
        self.engine = engine
        self.parameters = parameters
        self.stop_ids = stop_ids
        self.notify = notify
        self.messages: list[Message] = []

    @property
    def system(self) -> str:
        return self.messages[0]["content"] if self.messages[:1] and self._starts_with_system() else ""

    @system.setter
    def system(self, text: str) -> None:
        turns = self.messages[self._starts_with_system() :]
        self.messages = [{"role": "system", "content": text}, *turns] if text else turns

    def reset(self) -> None:
        """Forget the turns; the system prompt stays."""
        self.messages = self.messages[: self._starts_with_system()]

    def reply(self, text: str) -> Generator[str, None, None]:
        """Yield the reply to ``text`` piece by piece; both become part of the conversation.

        What was said before an interruption or ``close`` counts as the reply; when nothing was said yet,
        the turn is dropped. Raises UserError where the model fails.
        """
        question = {"role": "user", "content": text}
        config = self.engine.model.config
        prompt = encode_chat(
            self.engine.tokenizer,
            [*self.messages, question],
            max_new_tokens=self.parameters.max_new_tokens,
            max_positions=config.context_length,
            truncation=config.max_tokenizer_truncation,
        )
        if prompt.dropped_rounds:
            self.notify(f"too long for the context: the oldest {prompt.dropped_rounds} rounds were left out")
        if prompt.cut_tokens:
            self.notify(f"too long for the context: {prompt.cut_tokens} tokens were cut from the end")
        said: list[str] = []
        ended = False
        try:
            with contextlib.closing(self._generate(prompt.ids)) as pieces:
                for piece in pieces:
                    said.append(piece)
                    yield piece
            ended = True
        finally:
            if ended or any(said):
                self.messages += [question, {"role": "assistant", "content": "".join(said)}]

    def complete(self, text: str) -> Generator[str, None, None]:
        """Yield how the text goes on, as a base model does; the conversation is not touched.

        A text too long for the context loses its beginning.
        """
        if not text:
            raise UserError("the text to complete is empty")
        config = self.engine.model.config
        ids = self.engine.tokenizer.encode(text)
        limit = input_limit(
            self.parameters.max_new_tokens, config.context_length, config.max_tokenizer_truncation
        )
        if len(ids) > limit:
            self.notify(f"too long for the context: the first {len(ids) - limit} tokens were left out")
        yield from self._generate(ids[-limit:])

    def _generate(self, prompt_ids: list[int]) -> Generator[str, None, None]:
        reason: FinishReason | None = None
        with contextlib.closing(
            self.engine.stream(self.parameters.request(prompt_ids, self.stop_ids))
        ) as events:
            for event in events:
                reason = event.finish_reason
                if event.text:
                    yield event.text
                if event.error:
                    raise UserError(f"the reply failed: {event.error}")
        if reason == "length":
            self.notify(f"stopped at the limit (max_new_tokens = {self.parameters.max_new_tokens})")

    def _starts_with_system(self) -> bool:
        return bool(self.messages) and self.messages[0]["role"] == "system"


def load_session(
    model: str,
    overrides: Mapping[str, Any],
    *,
    defaults: Parameters = CHAT,
    threads: int | None = None,
    quantize: str | None = None,
    adapter: str | None = None,
    notify: Callable[[str], None],
) -> Session:
    """A session with ``model``, as ``load_engine`` loads it; ``overrides`` stand above its parameters."""
    loaded = load_engine(model, defaults=defaults, threads=threads, quantize=quantize, adapter=adapter)
    parameters = loaded.parameters.changed(overrides, "parameters")
    return Session(loaded.engine, parameters, loaded.stop_ids, notify)
