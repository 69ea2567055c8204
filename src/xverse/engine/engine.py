"""The engine: generation for several requests at once, one forward pass of the model per step.

A step runs what the scheduler selects (the next token of every decoding request, proposed tokens, chunks of
prompts) through the model as one row of tokens, and chooses a token wherever a request's last one has been
computed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from collections.abc import Sequence as Many
from functools import partial

import torch
from torch import Tensor

from xverse.config import UserError
from xverse.device import guard
from xverse.engine.adapters import Adapter, StepAdapters, order_of
from xverse.engine.cache import PagedCache, RaggedContext, position_bytes
from xverse.engine.choosing import NOT_FINITE, Row, choose_rows
from xverse.engine.dividing import share_of
from xverse.engine.graphs import recorded
from xverse.engine.prefix import PrefixCache
from xverse.engine.ranks import ranks_of
from xverse.engine.request import Event, Pooling, Request, Stats, TokenLogprob
from xverse.engine.sampling import Adjustment, Dice, is_greedy, key
from xverse.engine.scheduler import Scheduler, Work
from xverse.engine.scoring import Scores, ScoringItem, pool, report, score_prompt
from xverse.engine.sequence import Prompted, Sequence
from xverse.engine.settings import invariance
from xverse.engine.sizing import capacity, check_settings, step_bytes
from xverse.engine.speculation import Speculation, Speculator, propose_forced
from xverse.engine.stop import StopText
from xverse.kernels.fused_step import FusedStep, fused_step
from xverse.kernels.inference import use_kernels
from xverse.kernels.paged_attention import page_size
from xverse.model.transformer import XverseForCausalLM
from xverse.tokenizer import Tokenizer

_NOT_FINITE = "the model's logits are not finite: its weights are damaged or overflow their data type"
PREFIX_CACHE_BYTES = 2 * 2**30
CPU_CHUNK, GPU_CHUNK = 512, 2048  # tokens of a prompt in a step


class Engine:
    """Generates for many requests over one model. Not thread-safe: one thread submits and steps.

    On a CPU the model's layers are switched to the CPU kernels (``kernels/inference.py``).

    At most ``max_batch`` requests run at once; further ones wait. The cache holds ``max_cache_tokens`` in
    total (None: as many as fit, see ``capacity``); when it is full, requests are preempted and resume later.
    A step computes at most ``prefill_chunk`` prompt tokens (None: 512 on a CPU, 2,048 on a GPU). ``kv_dtype``
    "int8" halves the cache of a bfloat16 model; "auto" stores it in the model's dtype. Up to
    ``prefix_cache_bytes`` are kept after requests end, for requests with the same beginning; 0 turns this
    off. ``speculation`` None decodes one token at a time. ``adapter``: of requests that have none of their
    own. ``batch_invariant``: the bits of a request's logits depend neither on other requests nor on how its
    prompt is divided, cached or recomputed, nor on threads; None: as ``invariance`` decides. Raises UserError
    for values out of range, and for a model and a tokenizer that do not match.
    """

    def __init__(
        self,
        model: XverseForCausalLM,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 64,
        max_cache_tokens: int | None = None,
        prefill_chunk: int | None = None,
        kv_dtype: str = "auto",
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
        speculation: Speculation | None = None,
        adapter: Adapter | None = None,
        batch_invariant: bool | None = None,
    ) -> None:
        weight = model.model.norm.weight  # the one that is never quantised
        self.device = weight.device
        on_cpu = self.device.type == "cpu"
        self.prefill_chunk = prefill_chunk or (CPU_CHUNK if on_cpu else GPU_CHUNK)
        check_settings(model, tokenizer, max_batch, self.prefill_chunk, prefix_cache_bytes)
        self.model = model.eval()
        self.batch_invariant = invariance(model, batch_invariant)
        use_kernels(model, self.batch_invariant)
        self._adapter, self._adapters = adapter, StepAdapters(model)
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        self._vocab_size = tokenizer.vocab_size
        ranks = ranks_of(model)  # each process has the keys and values of some heads
        shape = model.config if ranks is None else share_of(model.config, ranks.count)
        token_bytes = position_bytes(shape, weight.dtype, kv_dtype)
        with guard(self.device):
            make_cache = partial(
                PagedCache, shape, weight.dtype, self.device, sequences=max_batch, kv_dtype=kv_dtype
            )
            room = capacity(
                max_cache_tokens,
                token_bytes,
                self.device,
                context=model.config.context_length,
                max_batch=max_batch,
                block_size=partial(
                    page_size,
                    self.device,
                    torch.int8 if kv_dtype == "int8" else weight.dtype,
                    model.config.head_dim,
                    sequences=max_batch,
                ),
                reserved=step_bytes(model, make_cache, self.prefill_chunk, max_batch),
                agreed=int if ranks is None else ranks.share,
            )
            self.max_cache_tokens, self._blocks = room.tokens, room.blocks
            # A smaller default limits the context; a smaller cache that was asked for refuses requests.
            self.context_length = model.config.context_length
            if max_cache_tokens is None:
                self.context_length = min(self.context_length, room.tokens)
            self._cache = make_cache(blocks=room.blocks, block_size=room.block_size)
            self._fused_step = (
                fused_step(model, self._cache.layers) if on_cpu else recorded(model, self._cache)
            )
        block_bytes = token_bytes * self._cache.block_size
        self._prefixes = PrefixCache(self._cache.pool, prefix_cache_bytes // block_bytes)
        self._scheduler = Scheduler(
            self._cache, self._prefixes, max_batch=max_batch, prefill_chunk=self.prefill_chunk,
            copies=ranks is None,
        )  # fmt: skip
        self._speculator = None if speculation is None else self._make_speculator(speculation, token_bytes)
        self._undelivered: list[Event] = []
        self._next_handle = 0

    def _make_speculator(self, speculation: Speculation, token_bytes: int) -> Speculator:
        return Speculator(
            speculation,
            self.model,
            self.tokenizer,
            cache_tokens=self.max_cache_tokens,
            max_batch=self.max_batch,
            prefill_chunk=self.prefill_chunk,
            position_bytes=token_bytes,
            native=self._fused_step is not None,
            rows_at_once=8 if self.device.type == "cpu" else 64,
        )

    @property
    def busy(self) -> bool:
        """Whether a request waits, runs, or has events that ``step`` has not returned yet."""
        return bool(self._scheduler.waiting or self._scheduler.running or self._undelivered)

    def stats(self) -> Stats:
        return Stats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            blocks=self._blocks,
            free_blocks=self._cache.pool.free,
            cached_blocks=len(self._prefixes),
            idle_blocks=self._prefixes.idle(),
            preemptions=self._scheduler.preemptions,
            reused_tokens=self._scheduler.reused_tokens,
            proposed_tokens=self._speculator.proposed if self._speculator else 0,
            accepted_tokens=self._speculator.accepted if self._speculator else 0,
        )

    def submit(self, request: Request) -> int:
        """Queue a request and return its handle. Raises UserError for a request that cannot run."""
        return self._enqueue(request, Prompted.of(request))

    def cancel(self, handle: int) -> bool:
        """Drop a request; it produces no further events. False if it is unknown or has ended."""
        self._undelivered = [event for event in self._undelivered if event.handle != handle]
        sequence = self._scheduler.find(handle)
        if sequence is not None and sequence.cache is not None:
            self._retire(sequence)
        elif sequence is not None:
            self._scheduler.waiting.remove(sequence)
            self._forget(sequence)
        return sequence is not None

    def fail(self, message: str) -> list[Event]:
        """End all running requests with an error, or the first waiting one if none runs: for a caller that
        caught an exception from ``step``. Other waiting requests are not affected."""
        events = [self._failed(sequence, message) for sequence in list(self._scheduler.running)]
        if not events and self._scheduler.waiting:
            sequence = self._scheduler.waiting.popleft()
            self._forget(sequence)
            events.append(self._error(sequence, message))
        return events

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Advance running requests and return their events; without speculation, at most one token each."""
        with guard(self.device):
            work = self._scheduler.schedule()
            propose_forced(work, self._scheduler, self.prefill_chunk)
            if self._speculator is not None and work:
                self._speculator.propose(work, self._scheduler)
            try:
                events = self._undelivered + (self._forward(work) if work else [])
            finally:
                self._adapters.set(())  # others may use the model too
            self._undelivered = []
            return events

    def stream(self, request: Request) -> Generator[Event, None, None]:
        """The events of one request as they occur. Closing the generator cancels the request.

        Other requests advance at the same time; the next ``step`` returns their events.
        """
        handle = self.submit(request)
        try:
            while True:
                for event in self._step_for(lambda other: other == handle):
                    yield event
                    if event.finish_reason is not None:
                        return
        finally:
            self.cancel(handle)

    def score(
        self, items: Many[ScoringItem], progress: Callable[[int], None] | None = None
    ) -> list[list[list[float]]]:
        """Natural log-probabilities of given continuations, without generating.

        An item is a prompt and its continuations, as ids; the result has one number per token of each
        continuation. Common prefixes of items are computed once. ``progress`` is called with the number of
        finished items. Raises UserError for an item that exceeds the context, or whose log-probabilities are
        not finite.
        """
        return self._scores(Scores(items, progress)).results

    def score_likeliest(
        self, items: Many[ScoringItem], progress: Callable[[int], None] | None = None
    ) -> list[list[tuple[float, bool]]]:
        """As ``score``: each continuation's sum, and whether all its tokens are the most probable ones."""
        scores = self._scores(Scores(items, progress, if_likeliest=True))
        return [
            [(sum(logprobs), likeliest) for logprobs, likeliest in zip(*pair, strict=True)]
            for pair in zip(scores.results, scores.likeliest, strict=True)
        ]

    def embed(self, prompts: Many[Many[int]], pooling: Pooling = "mean") -> list[list[float]]:
        """Embeddings of prompts, given as ids: the mean of their tokens' last hidden states, or the last
        token's, of unit length [D]. Raises UserError for a prompt that exceeds the context."""
        results: list[list[float]] = []
        for ids in prompts:
            for event in self.stream(Request(prompt_ids=ids, pooling=pooling, generate=False)):
                if event.embedding is None:
                    raise UserError(f"prompt {len(results)}: {event.error}")
                results.append(event.embedding)
        return results

    def _scores(self, scores: Scores) -> Scores:
        try:
            for request, prompted in scores.requests():
                scores.submitted(self._enqueue(request, prompted), prompted)
            while scores.open:
                for event in self._step_for(scores.open.__contains__):
                    scores.take(event)
        finally:
            for handle in list(scores.open):
                self.cancel(handle)
        return scores

    def _step_for(self, mine: Callable[[int], bool]) -> list[Event]:
        """Run a step. Return the events whose handle is ``mine``; keep the others for the next ``step``."""
        events = self.step()
        self._undelivered += [event for event in events if not mine(event.handle)]
        return [event for event in events if mine(event.handle)]

    def check(self, request: Request) -> None:
        """Raises UserError if ``submit`` would. May be called from any thread."""
        self._check(request, ())

    def _check(self, request: Request, finals: Many[int]) -> int:
        """The most tokens that the request may have in the end."""
        context, prompt = self.context_length, len(request.prompt_ids)
        if prompt > context or (prompt == context and request.max_new_tokens):
            raise UserError(f"prompt_ids: {prompt} tokens leave no room in a context of {context}")
        ids = [*request.prompt_ids, *finals]
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            raise UserError(f"prompt_ids: ids must be 0 to {self._vocab_size - 1}")
        if any(token >= self._vocab_size for token in request.sampling.logit_bias):
            raise UserError(f"logit_bias: ids must be 0 to {self._vocab_size - 1}")
        needed = min(prompt + request.max_new_tokens, context)
        if needed > self.max_cache_tokens:
            raise UserError(
                f"max_new_tokens: prompt and reply may need {needed} tokens of cache, which holds "
                f"{self.max_cache_tokens}; lower max_new_tokens"
            )
        return needed

    def _enqueue(self, request: Request, prompted: Prompted | None) -> int:
        needed = self._check(request, prompted.finals if prompted else ())
        sampling = request.sampling
        dice = None if is_greedy(sampling) else Dice(sampling.seed)
        adjustment = Adjustment(sampling, request.prompt_ids)
        needs_logits = bool(adjustment) or request.constraint is not None or request.logprobs is not None
        handle = self._next_handle
        self._next_handle += 1
        # With "dynamic" rope scaling keys depend on how long the text may become.
        salt = str(needed).encode() if self._cache.rope_depends_on_length else b""
        adapter = request.adapter or self._adapter
        if adapter is not None:
            self._adapters.attach(adapter)
            salt += adapter.digest
        self._scheduler.waiting.append(
            Sequence(
                handle=handle,
                request=request,
                tokens=list(request.prompt_ids),
                prompt_tokens=len(request.prompt_ids),
                most_tokens=needed,
                text_decoder=self.tokenizer.stream(request.skip_special),
                stop=StopText(request.sampling.stop),
                adjustment=adjustment,
                key=key(sampling),
                dice=dice,
                plain=dice is None and not needs_logits,
                prompted=prompted,
                acceptance=self._speculator.acceptance if self._speculator else 0.0,
                block_size=self._cache.block_size,
                salt=salt,
                adapter=adapter,
            )
        )
        return handle

    def _retire(self, sequence: Sequence) -> None:
        self._scheduler.retire(sequence)
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        if self._speculator is not None:
            self._speculator.forget(sequence)

    def _forward(self, work: list[Work]) -> list[Event]:
        """Compute ``work``; choose a token for each sequence whose last token is in it."""
        tokens: list[int] = []
        segments = []
        choosing_rows: list[int] = []  # rows of hidden states from which tokens are chosen
        choosing: list[Work] = []
        others: list[tuple[Work, slice]] = []
        order = order_of([item.sequence.adapter for item in work])
        work.sort(key=lambda item: order(item.sequence.adapter))
        for item in work:
            sequence = item.sequence
            assert sequence.cache is not None
            first, start = len(tokens), sequence.cache.length
            end = start + item.count
            tokens += sequence.tokens[start:end]
            tokens += item.proposed
            segments.append((sequence.cache, len(tokens) - first))
            if sequence.scoring or end < len(sequence.tokens):
                others.append((item, slice(first, len(tokens))))
            if end == len(sequence.tokens) and end < sequence.most_tokens:
                choosing.append(item)
                choosing_rows += range(first + item.count - 1, len(tokens))
        self._adapters.set(
            [(item.sequence.adapter, count) for item, (_, count) in zip(work, segments, strict=True)]
        )
        context = RaggedContext(segments, separate=self.batch_invariant)
        ids = torch.tensor(tokens).to(self.device, non_blocking=True)
        hidden = self._hidden(ids, context)  # [N, D]
        events: list[Event] = []
        for item, rows in others:
            if item.sequence.scoring:
                events += self._score(item, hidden[rows])
            else:
                self._scheduler.computed(item.sequence, item.count)
        if choosing:
            if len(choosing_rows) < len(tokens):
                hidden = hidden[torch.tensor(choosing_rows).to(self.device, non_blocking=True)]  # [R, D]
            self._adapters.set([(item.sequence.adapter, 1 + len(item.proposed)) for item in choosing])
            events += self._choose(choosing, self._logits(hidden))
        return events

    def _hidden(self, tokens: Tensor, context: RaggedContext) -> Tensor:
        """``tokens`` int64 [N] → normed hidden states [N, D]."""
        fused = self._fused_step
        if fused is not None and context.single and len(tokens) <= fused.most_tokens:
            if not self._adapters.any:
                return fused(tokens, context)
            if isinstance(fused, FusedStep):
                return fused(tokens, context, self._adapters.fused())
        return self.model.model(tokens[None], context)[0]

    def _logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, D] → logits [R, V], without an embedding's padding rows."""
        return self.model.lm_head(hidden)[:, : self._vocab_size]

    def _choose(self, work: list[Work], logits: Tensor) -> list[Event]:
        """Choose the next tokens of each sequence of ``work`` from its rows of ``logits`` [R, V]: one for
        each proposed token that is right, and one more."""
        rows = [
            Row(item.sequence, item.proposed[:count])
            for item in work
            for count in range(1 + len(item.proposed))
        ]
        tokens, logprobs = choose_rows(rows, logits)
        events: list[Event] = []
        first = 0
        for item in work:
            sequence, accepted = item.sequence, 0
            for at in range(first, first + 1 + len(item.proposed)):
                try:
                    row, token, logprob = rows[at], tokens[at], logprobs.get(at)
                    if row.deferred and token != NOT_FINITE:
                        row = Row(sequence)
                        (token,), found = choose_rows([row], logits[at : at + 1])
                        logprob = found.get(0)
                    event = self._advance(row, token, logprob)
                except Exception as error:  # also from a constraint; other requests continue
                    event = self._error(sequence, str(error) or type(error).__name__)
                events.append(event)
                index = at - first
                if event.finish_reason or index == len(item.proposed) or token != item.proposed[index]:
                    break
                accepted += 1
            first += 1 + len(item.proposed)
            self._scheduler.computed(sequence, item.count + accepted)
            if self._speculator is not None and not item.forced:
                self._speculator.verified(item, accepted)
            if event.finish_reason:
                self._retire(sequence)
        return events

    def _advance(self, row: Row, token: int, logprob: TokenLogprob | None) -> Event:
        """Append ``token``, which was chosen from ``row``."""
        sequence, request = row.sequence, row.sequence.request
        if token == NOT_FINITE:
            raise ValueError(_NOT_FINITE)
        if row.failure is not None:
            raise row.failure
        if token < 0:
            raise ValueError("every token is forbidden")
        if request.constraint is not None:
            request.constraint.accept(token)
        sequence.tokens.append(token)
        event = Event(
            handle=sequence.handle, token_id=token, text="", cached_tokens=sequence.reused, logprob=logprob
        )
        sequence.adjustment.add(token)
        if sequence.dice is not None:
            sequence.dice.use(1)
        if sequence.scoring:
            report(sequence, event)
        stopped = False
        if token in request.stop_ids:
            event.finish_reason = "stop"
        else:
            event.text, stopped = sequence.stop.push(sequence.text_decoder.push(token))
            if stopped:
                event.finish_reason = "stop"
            elif len(sequence.tokens) >= sequence.most_tokens:
                event.finish_reason = "length"
        if event.finish_reason is not None and not stopped:
            rest, stopped = self._rest(sequence)
            event.text += rest
            if stopped:
                event.finish_reason = "stop"
        event.stop_text = sequence.stop.found
        return event

    def _score(self, item: Work, hidden: Tensor) -> list[Event]:
        """Record what is asked for of a prompt chunk, from its ``hidden`` states [T, D]."""
        sequence = item.sequence
        prompted = sequence.prompted
        assert prompted is not None
        if prompted.pooling is not None:
            finite = pool(prompted, hidden)
        else:
            self._adapters.set_all(sequence.adapter)
            finite = score_prompt(prompted, sequence.tokens, sequence.computed, hidden, self._logits)
        if not finite:
            return [self._failed(sequence, _NOT_FINITE)]
        if sequence.computed + item.count < len(sequence.tokens):
            self._scheduler.computed(sequence, item.count)
        elif len(sequence.tokens) >= sequence.most_tokens:
            self._scheduler.computed(sequence, item.count)
            event = Event(handle=sequence.handle, token_id=None, text="", finish_reason="length")
            report(sequence, event)
            self._retire(sequence)
            return [event]
        return []  # _forward also chooses the first token

    @staticmethod
    def _rest(sequence: Sequence) -> tuple[str, bool]:
        """Text that was held back until the end, and whether it contained a stop text."""
        text, stopped = sequence.stop.push(sequence.text_decoder.finish())
        return text + sequence.stop.finish(), stopped

    def _failed(self, sequence: Sequence, message: str) -> Event:
        self._retire(sequence)
        return self._error(sequence, message)

    def _error(self, sequence: Sequence, message: str) -> Event:
        text = self._rest(sequence)[0]
        return Event(handle=sequence.handle, token_id=None, text=text, finish_reason="error", error=message)
