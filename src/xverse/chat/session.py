"""A conversation with a model: it knows the engine and the messages, and nothing of terminals."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from xverse.chat.conversation import Message
from xverse.config import UserError, build
from xverse.engine import Engine, FinishReason, Request, Sampling
from xverse.tokenizer import encode_chat, input_limit

# On a CPU small models run in float32: any CPU is fast at it, and their bytes do not matter.
_FLOAT32_BELOW = 1_000_000_000
# Their matmuls are so short that a second thread gains little, and loses much on a busy machine.
_ONE_THREAD_BELOW = 100_000_000


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How replies are generated. The defaults are those that XVERSE published for its chat models.

    Raises UserError, naming the field, for a value out of range.
    """

    temperature: float = 0.5
    top_k: int = 30
    top_p: float = 0.85
    repetition_penalty: float = 1.1
    seed: int | None = None
    max_new_tokens: int = 2048

    def __post_init__(self) -> None:
        self.request([0])  # its own checks are the ones that count

    def request(self, prompt_ids: list[int], stop_ids: tuple[int, ...] = ()) -> Request:
        return Request(
            prompt_ids=prompt_ids,
            max_new_tokens=self.max_new_tokens,
            sampling=Sampling(
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                repetition_penalty=self.repetition_penalty,
                seed=self.seed,
            ),
            stop_ids=stop_ids,
        )

    def changed(self, values: Mapping[str, Any], where: str) -> Parameters:
        """A copy with ``values``; raises UserError for an unknown name or a wrong value."""
        return build(Parameters, {**dataclasses.asdict(self), **values}, where)


CHAT = Parameters()
# Of upstream's demonstration of text generation with base models.
COMPLETION = Parameters(temperature=1.0, top_k=50, top_p=0.92, repetition_penalty=1.0, max_new_tokens=100)


def from_generation_config(values: Mapping[str, Any], defaults: Parameters) -> Parameters:
    """What a ``generation_config.json`` says, and ``defaults`` where it is silent."""
    names = {field.name for field in dataclasses.fields(Parameters)}
    chosen = {name: value for name, value in values.items() if name in names and value is not None}
    if values.get("do_sample") is False:
        chosen["temperature"] = 0.0
    return defaults.changed(chosen, "generation_config.json")


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
    notify: Callable[[str], None],
) -> Session:
    """A session with ``model`` (``nano``, a directory or a hub id).

    Its generation_config.json stands above ``defaults``, and ``overrides`` above both. ``threads`` None
    leaves the choice to torch, or one for a small model. ``quantize``: ``int8`` or ``int4``, made of an
    unquantised model as it is loaded.
    """
    import torch

    from xverse.formats import load_model, load_tokenizer, read_config, read_generation_config, resolve
    from xverse.formats.quantize import load_quantizing

    path = resolve(model)
    config = read_config(path)
    generation_config = read_generation_config(path)
    parameters = from_generation_config(generation_config, defaults).changed(overrides, "parameters")
    if threads is None and config.num_parameters() < _ONE_THREAD_BELOW:
        threads = 1
    if threads is not None:
        if not 1 <= threads <= 1024:
            raise UserError(f"threads: {threads} is out of range (1 to 1024)")
        torch.set_num_threads(threads)
    tokenizer = load_tokenizer(path)
    dtype = torch.float32 if config.num_parameters() < _FLOAT32_BELOW else None
    if quantize is None:
        weights = load_model(path, dtype)
    else:
        weights = load_quantizing(path, quantize, dtype)
    ends = generation_config.get("eos_token_id", config.eos_token_id)
    stop_ids = tuple(ends) if isinstance(ends, list) else (ends,)
    return Session(Engine(weights, tokenizer), parameters, stop_ids, notify)
