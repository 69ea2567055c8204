"""What the routes work with: one model behind a runner. Request bodies become engine requests here."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xverse.config import UserError
from xverse.engine import Constraint, Request, SamplingParams
from xverse.engine.request import MOST_ALTERNATIVES
from xverse.engine.sampling_params import MOST_BIASES
from xverse.serve import tools
from xverse.serve.access_log import current
from xverse.serve.errors import ApiError
from xverse.serve.grammar import Grammars
from xverse.serve.metrics import Metrics
from xverse.serve.protocol import ChatRequest, CompletionRequest, Generation
from xverse.serve.runner import EngineRunner
from xverse.tokenizer import Tokenizer, encode_chat

MOST_PROMPTS = 128
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens in /v1/completions


@dataclass
class Service:
    """``name`` is the model's; ``sampling`` holds its defaults; replies end at ``stop_ids``."""

    runner: EngineRunner
    tokenizer: Tokenizer
    name: str
    sampling: SamplingParams
    stop_ids: tuple[int, ...]
    grammars: Grammars
    metrics: Metrics
    timeout: float = 600.0  # seconds for a whole reply
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def context(self) -> int:
        return self.runner.engine.context_length

    def check_model(self, name: str) -> None:
        """Raises ApiError for the name of another model. An empty name means this one."""
        current().model = self.name
        if name and name != self.name:
            raise ApiError(
                404,
                f"model: '{name}' does not exist; this server has '{self.name}'",
                param="model",
                code="model_not_found",
            )

    def chat(self, body: ChatRequest) -> list[Request]:
        """One engine request for each of the ``n`` choices."""
        self.check_model(body.model)
        given = body.sampling()
        limit, limit_name = given.get("max_new_tokens"), "max_tokens"
        if body.max_completion_tokens is not None:
            if limit is not None:
                raise ApiError(400, "max_tokens and max_completion_tokens are mutually exclusive")
            limit, limit_name = body.max_completion_tokens, "max_completion_tokens"
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs to be true", param="top_logprobs")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        prompt = encode_chat(
            self.tokenizer,
            tools.chat_messages(body),
            max_new_tokens=1,
            max_positions=self.context * 2,  # nothing is cut here: _room refuses what is too long
            truncation=self.context * 2,
        )
        new_tokens = self._room("messages", len(prompt.ids), limit, limit_name)
        grammar = self.grammars.of_chat(body)
        choices = self._choices(body, 1)
        return [
            self._request(body, prompt.ids, new_tokens, choice, logprobs=logprobs, grammar=grammar)
            for choice in choices
        ]

    def complete(self, body: CompletionRequest) -> list[Request]:
        """``n`` engine requests for each prompt, in order."""
        self.check_model(body.model)
        prompts = self._prompts(body.prompt)
        choices = self._choices(body, len(prompts))
        limit = body.sampling().get("max_new_tokens", COMPLETION_TOKENS)
        requests = []
        for ids in prompts:
            new_tokens = self._room("prompt", len(ids), limit, "max_tokens", least=0 if body.echo else 1)
            prompt_logprobs = body.logprobs if body.echo else None
            if new_tokens == 0 and prompt_logprobs is None:
                prompt_logprobs = 0
            requests += [
                self._request(
                    body, ids, new_tokens, choice, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs
                )
                for choice in choices
            ]
        return requests

    def _choices(self, body: Generation, prompts: int) -> range:
        """Raises ApiError for more replies at once than the server ever accepts."""
        count = prompts * (body.n or 1)
        if count > self.runner.most:
            text = f"n: {count} replies at once are too many; the limit is {self.runner.most}"
            raise ApiError(400, text, param="n")
        return range(body.n or 1)

    def _prompts(self, prompt: Any) -> list[list[int]]:
        """Token ids of each prompt."""
        texts = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
        if not texts:
            raise ApiError(400, "prompt: the list is empty", param="prompt")
        if len(texts) > MOST_PROMPTS:
            text = f"prompt: {len(texts)} prompts are too many; the limit is {MOST_PROMPTS}"
            raise ApiError(400, text, param="prompt")
        prompts = [self.tokenizer.encode(text) if isinstance(text, str) else list(text) for text in texts]
        if not all(prompts):
            raise ApiError(400, "prompt: the prompt has no tokens", param="prompt")
        return prompts

    def _room(self, field_name: str, prompt: int, limit: int | None, limit_name: str, least: int = 1) -> int:
        """How many tokens to generate. Raises ApiError if the context has no room for them."""
        left = self.context - prompt
        if limit is not None and limit < least:
            raise ApiError(400, f"{limit_name}: {limit} is out of range (at least {least})", param=limit_name)
        if left < (1 if limit is None else limit):
            text = (
                f"{field_name}: {prompt} tokens and {limit or 1} to generate exceed the context of "
                f"{self.context}"
            )
            raise ApiError(400, text, param=field_name, code="context_length_exceeded")
        return min(self.sampling.max_new_tokens, left) if limit is None else limit

    def _request(
        self,
        body: Generation,
        ids: Sequence[int],
        new_tokens: int,
        choice: int,
        *,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        grammar: str | None = None,
    ) -> Request:
        if logprobs is not None and not 0 <= logprobs <= MOST_ALTERNATIVES:
            name = "top_logprobs" if isinstance(body, ChatRequest) else "logprobs"
            text = f"{name}: {logprobs} is out of range (0 to {MOST_ALTERNATIVES})"
            raise ApiError(400, text, param=name)
        constraint: Constraint | None = None if grammar is None else self.grammars.start(grammar)
        try:
            request = Request(
                prompt_ids=ids,
                sampling=self._sampling(body, choice, new_tokens),
                stop_ids=self.stop_ids,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                constraint=constraint,
                generate=new_tokens > 0,
            )
            self.runner.engine.check(request)
            return request
        except UserError as error:
            raise ApiError(400, str(error), param=str(error).partition(":")[0].split()[0]) from None

    def _sampling(self, body: Generation, choice: int, new_tokens: int) -> SamplingParams:
        """The body's parameters, and the model's defaults for those that it does not set.

        Each choice of a seeded request has a seed of its own, without which all would be equal.
        """
        given: dict[str, Any] = body.sampling() | {"max_new_tokens": max(new_tokens, 1)}
        if "logit_bias" in given:
            given["logit_bias"] = _biases(given["logit_bias"])
        seed = given.get("seed", self.sampling.seed)
        if seed is not None:
            given["seed"] = seed + (choice if seed < 2**61 else -choice)
        return dataclasses.replace(self.sampling, **given)


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    if not all(token.isascii() and token.isdigit() and len(token) < 10 for token in given):
        raise ApiError(400, "logit_bias: the keys must be token ids", param="logit_bias")
    if len(given) > MOST_BIASES:
        text = f"logit_bias: {len(given)} tokens are too many; the limit is {MOST_BIASES}"
        raise ApiError(400, text, param="logit_bias")
    return {int(token): bias for token, bias in given.items()}
