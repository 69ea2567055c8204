"""What the routes work with: one model behind a runner, and how a client's words become engine requests."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xverse.config import UserError
from xverse.engine import Constraint, Request, Sampling
from xverse.engine.load import Parameters
from xverse.engine.request import MOST_ALTERNATIVES, RANGES
from xverse.serve import tools
from xverse.serve.errors import ApiError
from xverse.serve.grammar import Grammars
from xverse.serve.metrics import Metrics
from xverse.serve.protocol import ChatRequest, CompletionRequest, Generation
from xverse.serve.runner import EngineRunner
from xverse.tokenizer import Tokenizer, encode_chat


@dataclass
class Service:
    """``name`` is the model's; ``parameters`` are its defaults; replies end at ``stop_ids``."""

    runner: EngineRunner
    tokenizer: Tokenizer
    name: str
    parameters: Parameters
    stop_ids: tuple[int, ...]
    grammars: Grammars
    metrics: Metrics
    timeout: float = 600.0  # seconds for a whole reply
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def context(self) -> int:
        return self.runner.engine.model.config.context_length

    def check_model(self, name: str) -> None:
        """Raises ApiError for another model's name. An empty name is taken for ours."""
        if name and name != self.name:
            raise ApiError(
                404, f"model: '{name}' is not here, '{self.name}' is", param="model", code="model_not_found"
            )

    def chat(self, asked: ChatRequest) -> list[Request]:
        """One engine request for each of the ``n`` choices."""
        self.check_model(asked.model)
        if asked.max_tokens is not None and asked.max_completion_tokens is not None:
            raise ApiError(
                400, "max_tokens and max_completion_tokens contradict each other; give one of them"
            )
        if asked.top_logprobs is not None and not asked.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs to be true", param="top_logprobs")
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        most = asked.max_completion_tokens if asked.max_tokens is None else asked.max_tokens
        prompt = encode_chat(
            self.tokenizer,
            tools.messages(asked),
            max_new_tokens=1,
            max_positions=self.context * 2,  # nothing is cut here: what is too long is refused below
            truncation=self.context * 2,
        )
        field_name = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
        new_tokens = self._room("messages", len(prompt.ids), most, field_name)
        grammar = self.grammars.of_chat(asked)
        self._check_count(asked.n or 1)
        return [
            self._request(asked, prompt.ids, new_tokens, number, logprobs=logprobs, grammar=grammar)
            for number in range(asked.n or 1)
        ]

    def complete(self, asked: CompletionRequest) -> list[Request]:
        """``n`` engine requests for each prompt, in order."""
        self.check_model(asked.model)
        requests = []
        prompts = self._prompts(asked.prompt)
        self._check_count(len(prompts) * (asked.n or 1))
        for ids in prompts:
            most = 16 if asked.max_tokens is None else asked.max_tokens  # OpenAI's default
            new_tokens = self._room("prompt", len(ids), most, "max_tokens", least=0 if asked.echo else 1)
            for number in range(asked.n or 1):
                prompted = asked.logprobs if asked.echo else None
                if new_tokens == 0 and prompted is None:
                    prompted = 0
                requests.append(
                    self._request(
                        asked, ids, new_tokens, number, logprobs=asked.logprobs, prompt_logprobs=prompted
                    )
                )
        return requests

    def _check_count(self, count: int) -> None:
        """Raises ApiError for more replies at once than the server would ever take."""
        if count > self.runner.most:
            text = f"n: {count} replies are too many at once, at most {self.runner.most}"
            raise ApiError(400, text, param="n")

    def _prompts(self, prompt: Any) -> list[list[int]]:
        texts = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
        if not texts:
            raise ApiError(400, "prompt: the list is empty", param="prompt")
        if len(texts) > 128:
            raise ApiError(400, f"prompt: {len(texts)} prompts are too many, at most 128", param="prompt")
        found = []
        for text in texts:
            ids = self.tokenizer.encode(text) if isinstance(text, str) else list(text)
            if not ids:
                raise ApiError(400, "prompt: the prompt has no tokens", param="prompt")
            found.append(ids)
        return found

    def _room(self, name: str, prompt: int, most: int | None, field_name: str, least: int = 1) -> int:
        """How many tokens may be generated. Raises ApiError where that is none, or fewer than was asked."""
        left = self.context - prompt
        if most is not None and most < least:
            raise ApiError(400, f"{field_name}: {most} is out of range (at least {least})", param=field_name)
        if left < (1 if most is None else most):
            asked = f"{prompt} tokens and {most or 1} to generate"
            text = f"{name}: {asked} do not fit into the context of {self.context}"
            raise ApiError(400, text, param=name, code="context_length_exceeded")
        return min(self.parameters.max_new_tokens, left) if most is None else most

    def _request(
        self,
        asked: Generation,
        ids: Sequence[int],
        new_tokens: int,
        number: int,
        *,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        grammar: str | None = None,
    ) -> Request:
        if logprobs is not None and not 0 <= logprobs <= MOST_ALTERNATIVES:
            name = "top_logprobs" if isinstance(asked, ChatRequest) else "logprobs"
            text = f"{name}: {logprobs} is out of range (0 to {MOST_ALTERNATIVES})"
            raise ApiError(400, text, param=name)
        constraint: Constraint | None = None if grammar is None else self.grammars.start(grammar)
        try:
            request = Request(
                prompt_ids=ids,
                max_new_tokens=new_tokens,
                sampling=self._sampling(asked, number),
                stop_ids=self.stop_ids,
                stop=asked.stops(),
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                constraint=constraint,
            )
            self.runner.engine.check(request)
            return request
        except UserError as error:
            raise ApiError(400, str(error), param=str(error).partition(":")[0].split()[0]) from None

    def _sampling(self, asked: Generation, number: int) -> Sampling:
        """What was asked, and the model's defaults for what was not. Choice ``number`` of a seeded request
        has a seed of its own: equal ones would say the same."""
        own = self.parameters
        chosen: dict[str, Any] = {
            name: getattr(own, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")
        }
        for name in (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ):
            if getattr(asked, name) is not None:
                chosen[name] = getattr(asked, name)
        if asked.logit_bias:
            chosen["logit_bias"] = _biases(asked.logit_bias)
        if asked.seed is not None:
            chosen["seed"] = asked.seed + (number if asked.seed < RANGES["seed"][1] / 2 else -number)
        return Sampling(**chosen)


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    if not all(token.isascii() and token.isdigit() and len(token) < 10 for token in given):
        raise ApiError(400, "logit_bias: the keys are ids of tokens", param="logit_bias")
    if len(given) > 1024:
        raise ApiError(400, f"logit_bias: {len(given)} tokens are too many, at most 1024", param="logit_bias")
    return {int(token): bias for token, bias in given.items()}


def size_of(value: Any) -> int:
    """Bytes of a value as JSON."""
    return len(json.dumps(value).encode())
