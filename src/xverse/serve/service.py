"""What the routes work with: one model behind a runner. Request bodies become engine requests here."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import xverse
from xverse.config import UserError
from xverse.engine import Adapter, AdapterLoader, Constraint, Request, SamplingParams
from xverse.engine.adapters import MOST_ADAPTERS, check_name
from xverse.serve import tools
from xverse.serve.access_log import current
from xverse.serve.batches import Batches
from xverse.serve.calls import CallParser
from xverse.serve.dialects import with_field_names
from xverse.serve.errors import ApiError
from xverse.serve.grammar import Compiled, Grammars
from xverse.serve.limits import MinTokens
from xverse.serve.metrics import Metrics
from xverse.serve.protocol import ChatRequest, CompletionRequest, Generation, Message, Tool
from xverse.serve.runner import EngineRunner
from xverse.tokenizer import Tokenizer, encode_chat
from xverse.tokenizer.tools import CLOSE

_ANY_LENGTH = 2**31
LATEST = ":latest"  # what Ollama's API appends to names without a tag
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
    adapter: Adapter | None = None  # of the replies, if any
    parent: str | None = None  # the name of the model that the adapter changes
    adapted: dict[str, Service] = field(default_factory=dict)  # services of the same engine, with adapters
    read_adapter: AdapterLoader | None = None
    adapter_folder: Path | None = None  # where adapters may be loaded from at run time
    batches: Batches | None = None  # and files, if the server keeps them

    @property
    def context(self) -> int:
        return self.runner.engine.context_length

    @functools.cached_property
    def fingerprint(self) -> str:
        """OpenAI's ``system_fingerprint``: equal for servers that answer a seeded request alike."""
        engine = self.runner.engine
        weight = engine.model.model.norm.weight
        described = (xverse.__version__, torch.__version__, self.name, self.stop_ids, self.sampling)
        adapter = b"" if self.adapter is None else self.adapter.digest
        text = repr((*described, engine.model.config, weight.dtype, weight.device.type, adapter))
        return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:12]

    def of(self, name: str) -> Service:
        """The service of this name: this one, which an empty name also means, or one with an adapter. Raises
        ApiError if there is none."""
        found = self if name in ("", self.name) else self.adapted.get(name)
        current().model = (found or self).name
        if found is None:
            names = ", ".join(f"'{each}'" for each in (self.name, *sorted(self.adapted)))
            text = f"model: '{name[:80]}' does not exist; this server has {names}"
            raise ApiError(404, text, code="model_not_found")
        return found

    def check_new(self, name: str) -> None:
        """Raises UserError for a name that is taken or cannot be one, and for one adapter too many."""
        check_name(name)
        # Ollama's API takes NAME:latest for NAME.
        if name.removesuffix(LATEST) in (known.removesuffix(LATEST) for known in (self.name, *self.adapted)):
            raise UserError(f"'{name}' is already the name of a model")
        if len(self.adapted) >= MOST_ADAPTERS:
            raise UserError(f"{MOST_ADAPTERS} adapters are loaded, the most at once; unload one first")

    def adopt(self, name: str, adapter: Adapter) -> None:
        """Serve an adapter of the engine's model under a name. Raises UserError as ``check_new`` does."""
        self.check_new(name)
        now = int(time.time())
        mine = dataclasses.replace(self, name=name, adapter=adapter, parent=self.name, created=now)
        self.adapted[name] = mine

    def chat(self, body: ChatRequest, grammar: Compiled | None = None, clamp: bool = False) -> list[Request]:
        """One engine request for each of the ``n`` choices. ``clamp``: a limit of tokens that exceeds the
        room in the context is lowered to it, where that is the API's rule."""
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs to be true")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        self._check_continuation(body)
        offered = tools.offered_tools(body)
        ids = self.chat_ids(body.messages, offered, body.continue_final_message)
        limit = body.sampling().get("max_new_tokens")
        if clamp and limit is not None and limit > 0:
            limit = min(limit, max(self.context - len(ids), 1))
        new_tokens = self._room(body, "messages", len(ids), limit, offered)
        return [
            self._request(body, ids, new_tokens, choice, logprobs=logprobs, grammar=grammar)
            for choice in self._choices(body, 1)
        ]

    def _check_continuation(self, body: ChatRequest) -> None:
        """Raises ApiError if a message is to be continued and the model's template always ends it."""
        last = body.messages[-1].role
        if body.continue_final_message and last == "assistant" and self.tokenizer.template is not None:
            text = "continue_final_message: the chat template of this model cannot continue a message"
            raise ApiError(400, text)

    def chat_ids(self, messages: list[Message], offered: list[Tool], continue_last: bool) -> list[int]:
        """The ids of a conversation, whatever its length."""
        return encode_chat(
            self.tokenizer,
            tools.chat_messages(messages, offered),
            max_new_tokens=1,
            max_positions=_ANY_LENGTH,  # nothing is cut here: _room refuses what is too long
            truncation=_ANY_LENGTH,
            continue_last=continue_last,
        ).ids

    def call_parser(self, body: ChatRequest) -> CallParser:
        return CallParser({tool.function.name for tool in tools.offered_tools(body)})

    def complete(self, body: CompletionRequest, grammar: Compiled | None = None) -> list[Request]:
        """``n`` engine requests for each prompt, in order."""
        if body.best_of not in (None, 1, body.n):
            raise ApiError(400, "best_of: must be equal to n")
        prompts = [self.prompt_ids(prompt) for prompt in body.prompt]
        choices = self._choices(body, len(prompts))
        limit = body.sampling().get("max_new_tokens", COMPLETION_TOKENS)
        requests = []
        for ids in prompts:
            new_tokens = self._room(body, "prompt", len(ids), limit, least=0 if body.echo else 1)
            prompt_logprobs = body.logprobs if body.echo else None
            if new_tokens == 0 and prompt_logprobs is None:
                prompt_logprobs = 0
            requests += [
                self._request(
                    *(body, ids, new_tokens, choice),
                    logprobs=body.logprobs,
                    prompt_logprobs=prompt_logprobs,
                    grammar=grammar,
                )
                for choice in choices
            ]
        return requests

    def prompt_ids(self, prompt: str | list[int]) -> list[int]:
        """An empty prompt is the beginning of a text."""
        if isinstance(prompt, str):
            prompt = [*self.tokenizer.prefix_ids, *self.tokenizer.encode(prompt)]
        return prompt or [self.tokenizer.bos_id]

    def _choices(self, body: Generation, prompts: int) -> range:
        """Raises ApiError for more replies at once than the server ever accepts."""
        count = prompts * (body.n or 1)
        if count > self.runner.most:
            raise ApiError(400, f"n: {count} replies at once are too many; the limit is {self.runner.most}")
        return range(body.n or 1)

    def _room(
        self,
        body: Generation,
        field_name: str,
        prompt: int,
        limit: int | None,
        offered: Sequence[Tool] = (),
        least: int = 1,
    ) -> int:
        """How many tokens to generate. Raises ApiError if the context has no room for them."""
        left = self.context - prompt
        if limit is not None and limit < least:
            name = body.limit_name
            raise ApiError(400, f"{name}: {limit} is out of range (at least {least})")
        if left < least:
            text = f"{field_name}: {prompt} tokens exceed the context of {self.context}"
            if left == 0:
                text = f"{field_name}: {prompt} tokens leave no room in the context of {self.context}"
            if offered:
                described = len(self.tokenizer.encode(tools.tools_text(list(offered))))
                text += f"; {described} of them describe tools"
            raise ApiError(400, text, code="context_length_exceeded")
        if limit is not None and left < limit:
            text = (
                f"{body.limit_name}: {limit} is too large; {field_name} has {prompt} tokens and the context "
                f"{self.context}, which leaves {left}"
            )
            raise ApiError(400, text, code="context_length_exceeded")
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
        grammar: Compiled | None = None,
    ) -> Request:
        if body.min_tokens > max(new_tokens, 1):
            text = f"min_tokens: {body.min_tokens} is more than the reply may have ({new_tokens})"
            raise ApiError(400, text)
        constraint: Constraint | None = None if grammar is None else self.grammars.start(grammar, body)
        # Others are in no reply.
        known = (token for token in body.stop_token_ids if 0 <= token < self.tokenizer.vocab_size)
        stop_ids = (*(() if body.ignore_eos else self.stop_ids), *known)
        if body.min_tokens:
            constraint = MinTokens(constraint, stop_ids, body.min_tokens, self.tokenizer.vocab_size)
        try:
            request = Request(
                prompt_ids=ids,
                sampling=self._sampling(body, choice, new_tokens),
                stop_ids=stop_ids,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                constraint=constraint,
                adapter=self.adapter,
                generate=new_tokens > 0,
                skip_special=body.skip_special_tokens,
            )
            self.runner.engine.check(request)
            return request
        except UserError as error:
            raise _in_the_words_of(body, error) from None

    def _sampling(self, body: Generation, choice: int, new_tokens: int) -> SamplingParams:
        """The body's parameters, and the model's defaults for those that it does not set.

        Each choice of a seeded request has a seed of its own, without which all would be equal.
        """
        given: dict[str, Any] = body.sampling() | {"max_new_tokens": max(new_tokens, 1)}
        if "logit_bias" in given:
            given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
        if isinstance(body, ChatRequest) and body.all_tools() and body.parallel_tool_calls is False:
            given["stop"] = (*given.get("stop", self.sampling.stop), CLOSE)  # ends the reply after one call
        seed = given.get("seed", self.sampling.seed)
        if seed is not None:
            given["seed"] = seed + (choice if seed < 2**61 else -choice)
        return dataclasses.replace(self.sampling, **given)


def _in_the_words_of(body: Generation, error: UserError) -> ApiError:
    """The engine's error with the API's name of the field."""
    field_names = {"prompt_ids": "prompt", "max_new_tokens": body.limit_name}
    if isinstance(body, ChatRequest):
        field_names |= {"prompt_ids": "messages", "logprobs": "top_logprobs"}
    text = with_field_names(field_names, str(error))
    return ApiError(400, text, param=text.partition(":")[0].split()[0])
