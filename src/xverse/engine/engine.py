"""The engine: several requests at once, one model forward for all of their next tokens.

A step prefills at most one chunk of one prompt, then decodes one token of every request whose prompt is
done, so a long prompt never holds up the others for longer than a chunk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from xverse import hardware
from xverse.config import UserError
from xverse.engine.cache import (
    BLOCK_SIZE,
    DecodeContext,
    PagedCache,
    PrefillContext,
    SequenceCache,
    position_bytes,
)
from xverse.engine.request import Event, FinishReason, Request
from xverse.engine.sampling import Sampler, choose, is_greedy, samplers
from xverse.engine.stop import StopText
from xverse.model.transformer import XverseForCausalLM
from xverse.quant.inference import use_kernels
from xverse.tokenizer import StreamDecoder, Tokenizer

_NOT_FINITE = "the model's logits are not finite numbers: its weights are damaged, or overflow their type"


@dataclass(eq=False)
class _Sequence:
    """A request while it runs. ``next_token`` is chosen but not in the cache yet; None while prefilling."""

    handle: int
    request: Request
    tokens_at_most: int
    cache: SequenceCache
    decoder: StreamDecoder
    stop: StopText
    seen: Tensor  # bool [V]
    steps: list[Sampler]
    generator: torch.Generator | None
    generated: int = 0
    next_token: int | None = None


class Engine:
    """Generates for many requests over one model. Not thread-safe: one thread submits and steps.

    On a CPU the model's layers are told to compute in our kernels (``quant/inference.py``).

    ``max_batch`` requests run at once and further ones wait; so does a request whose prompt and longest
    answer would take the running ones above ``max_cache_tokens`` in all (None: what half of the free memory
    holds). ``kv_dtype`` "int8" halves the cache of a bfloat16 model; "auto" stores it in the model's type.
    """

    def __init__(
        self,
        model: XverseForCausalLM,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 64,
        max_cache_tokens: int | None = None,
        prefill_chunk: int = 512,
        kv_dtype: str = "auto",
    ) -> None:
        for name, value in (("max_batch", max_batch), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise UserError(f"{name}: {value} is out of range (at least 1)")
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}: "
                "they do not belong together"
            )
        self.model = model.eval()
        use_kernels(model)
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        self.prefill_chunk = prefill_chunk
        weight = model.model.norm.weight  # the one that is never quantised
        self._device, dtype = weight.device, weight.dtype
        if max_cache_tokens is None:
            max_cache_tokens = self._affordable(position_bytes(model.config, dtype, kv_dtype))
        self.max_cache_tokens = max_cache_tokens
        # Each running request may leave a block partly used.
        blocks = -(-max_cache_tokens // BLOCK_SIZE) + max_batch
        self._cache = PagedCache(model.config, dtype, self._device, blocks=blocks, kv_dtype=kv_dtype)
        self._vocab_size = tokenizer.vocab_size
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: list[_Sequence] = []
        self._undelivered: list[Event] = []
        self._next_handle = 0

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs, or has events that no ``step`` returned yet."""
        return bool(self._waiting or self._running or self._undelivered)

    def submit(self, request: Request) -> int:
        """Queue a request; returns its handle. Raises UserError for a prompt that cannot run here."""
        context, prompt = self.model.config.max_position_embeddings, len(request.prompt_ids)
        if prompt >= context:
            raise UserError(f"prompt_ids: {prompt} tokens leave no room in a context of {context}")
        if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= self._vocab_size:
            raise UserError(f"prompt_ids: ids must be 0 to {self._vocab_size - 1}")
        needed = self._tokens_at_most(request)
        if needed > self.max_cache_tokens:
            raise UserError(
                f"max_new_tokens: prompt and answer may take {needed} tokens of cache, "
                f"and there are {self.max_cache_tokens}; ask for fewer"
            )
        handle = self._next_handle
        self._next_handle += 1
        self._waiting.append((handle, request))
        return handle

    def cancel(self, handle: int) -> bool:
        """Drop a request; no event of it comes any more. False where it was not there, or had ended."""
        before = len(self._waiting) + len(self._running)
        self._waiting = deque(item for item in self._waiting if item[0] != handle)
        for sequence in [each for each in self._running if each.handle == handle]:
            self._retire(sequence)
        self._undelivered = [event for event in self._undelivered if event.handle != handle]
        return len(self._waiting) + len(self._running) < before

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Advance every running request by at most one token; returns what happened, [] when idle."""
        self._admit()
        events: list[Event] = []
        prefilling = next((item for item in self._running if item.next_token is None), None)
        decoding = [item for item in self._running if item.next_token is not None]
        if prefilling is not None:
            events += self._prefill(prefilling)
        if decoding:
            events += self._decode(decoding)
        events, self._undelivered = self._undelivered + events, []
        return events

    def stream(self, request: Request) -> Generator[Event, None, None]:
        """The events of one request alone, as they come. Closing the generator cancels the request.

        Other requests advance at the same time; their events are kept for the next ``step``.
        """
        handle = self.submit(request)
        try:
            while True:
                events = self.step()
                self._undelivered += [event for event in events if event.handle != handle]
                for event in events:
                    if event.handle == handle:
                        yield event
                        if event.finish_reason is not None:
                            return
        finally:
            self.cancel(handle)

    def _tokens_at_most(self, request: Request) -> int:
        longest = len(request.prompt_ids) + request.max_new_tokens
        return min(longest, self.model.config.max_position_embeddings)

    def _affordable(self, bytes_each: int) -> int:
        """Tokens of cache that all running requests may need, or that half of the free memory holds."""
        context = self.model.config.max_position_embeddings
        if self._device.type == "cuda":
            free: int | None = torch.cuda.mem_get_info(self._device)[0]
        else:
            free = hardware.memory()[1]
        most = self.max_batch * context
        return most if free is None else min(most, max(context, free // 2 // bytes_each))

    def _retire(self, sequence: _Sequence) -> None:
        """It runs no longer; its blocks are free."""
        self._running.remove(sequence)
        sequence.cache.release()

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.max_batch:
            needed = self._tokens_at_most(self._waiting[0][1])
            taken = sum(sequence.tokens_at_most for sequence in self._running)
            if taken + needed > self.max_cache_tokens:
                return
            self._running.append(self._start(*self._waiting.popleft()))

    def _start(self, handle: int, request: Request) -> _Sequence:
        seen = torch.zeros(self._vocab_size, dtype=torch.bool, device=self._device)  # [V]
        seen[torch.tensor(request.prompt_ids, device=self._device)] = True
        generator = None
        if not is_greedy(request.sampling):
            generator = torch.Generator(self._device)
            if request.sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(request.sampling.seed)
        return _Sequence(
            handle=handle,
            request=request,
            tokens_at_most=self._tokens_at_most(request),
            cache=SequenceCache(self._cache),
            decoder=self.tokenizer.stream(),
            stop=StopText(request.stop),
            seen=seen,
            steps=samplers(request.sampling, seen),
            generator=generator,
        )

    def _prefill(self, sequence: _Sequence) -> list[Event]:
        start, prompt = sequence.cache.length, sequence.request.prompt_ids
        chunk = list(prompt[start : start + self.prefill_chunk])
        context = PrefillContext(sequence.cache, len(chunk))
        hidden = self.model.model(torch.tensor([chunk], device=self._device), context)  # [1, T, D]
        sequence.cache.length += len(chunk)
        if sequence.cache.length < len(prompt):
            return []
        return self._choose([sequence], self.model.lm_head(hidden[:, -1]))

    def _decode(self, sequences: list[_Sequence]) -> list[Event]:
        column = [[sequence.next_token] for sequence in sequences]
        tokens = torch.tensor(column, device=self._device)  # [B, 1]
        context = DecodeContext([sequence.cache for sequence in sequences])
        hidden = self.model.model(tokens, context)  # [B, 1, D]
        for sequence in sequences:
            sequence.cache.length += 1
        return self._choose(sequences, self.model.lm_head(hidden[:, -1]))

    def _choose(self, sequences: list[_Sequence], logits: Tensor) -> list[Event]:
        """The next token of each sequence from its row of ``logits`` [B, V]."""
        logits = logits[:, : self._vocab_size].float()  # padding rows of an embedding are no tokens
        log_sums = logits.logsumexp(dim=-1)  # [B], not finite where any logit is NaN or +inf
        events = []
        for row, sequence, log_sum in zip(logits, sequences, log_sums.tolist(), strict=True):
            if not -torch.inf < log_sum < torch.inf:
                self._retire(sequence)
                events.append(self._failed(sequence))
                continue
            token = choose(row, sequence.steps, sequence.generator)
            events.append(self._advance(sequence, token, row[token].item() - log_sum))
        return events

    def _advance(self, sequence: _Sequence, token: int, logprob: float) -> Event:
        sequence.generated += 1
        sequence.next_token = token
        sequence.seen[token] = True
        text, stopped = "", False
        reason: FinishReason | None = None
        if token in sequence.request.stop_ids:
            reason = "stop"
        else:
            text, stopped = sequence.stop.push(sequence.decoder.push(token))
            if stopped:
                reason = "stop"
            elif len(sequence.request.prompt_ids) + sequence.generated >= sequence.tokens_at_most:
                reason = "length"
        if reason is not None:
            self._retire(sequence)
        if reason is not None and not stopped:
            rest, stopped = self._rest(sequence)
            text += rest
            reason = "stop" if stopped else reason
        return Event(handle=sequence.handle, token_id=token, text=text, logprob=logprob, finish_reason=reason)

    @staticmethod
    def _rest(sequence: _Sequence) -> tuple[str, bool]:
        """Text that was held back until the end, and whether a stop string came to light in it."""
        text, stopped = sequence.stop.push(sequence.decoder.finish())
        return text + sequence.stop.finish(), stopped

    def _failed(self, sequence: _Sequence) -> Event:
        return Event(
            handle=sequence.handle,
            token_id=None,
            text=self._rest(sequence)[0],
            logprob=None,
            finish_reason="error",
            error=_NOT_FINITE,
        )
