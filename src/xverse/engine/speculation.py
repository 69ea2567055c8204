"""Speculative decoding: tokens are guessed, and one pass of the model verifies several of them at once.

A guess is one token for each place, not a distribution. The model's own next token is chosen in each place as
ever; as long as it is the guessed one, the place behind it has been computed too. So what is chosen, greedily
or by drawing, is exactly what would have been chosen without guesses (the rule of Leviathan et al., 2023,
arXiv:2211.17192, for a proposal that is certain of its token).
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol

import torch

from xverse.config import UserError
from xverse.engine.cache import BLOCK_SIZE, PagedCache, RaggedContext, SequenceCache
from xverse.engine.sequence import Sequence
from xverse.model.transformer import XverseForCausalLM
from xverse.quant.inference import use_kernels
from xverse.tokenizer import Tokenizer

MOST_TOKENS = 16
# What one more row costs, as a share of a step of one row: weights are read once for all of them, and of the
# keys and values a part is read again. On a CPU PyTorch's products are slow at the second row, no slower at
# the eighth (docs/LOG.md has the measurements).
_ROW_COST, _ROW_READS, PLAIN_SECOND_ROW = 0.02, 0.4, 0.5
_SMOOTHING = 0.1  # weight of one verified token in the running mean of acceptance
_HOPE = 0.8  # acceptance that a sequence begins with
_FORGETTING = 0.02  # each step without guesses: after many, hope comes back


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """How to guess: from what the text says already (prompt lookup), or with a small ``draft`` model.

    ``max_tokens`` are guessed at most; how many is adapted to how many were right. On a CPU with INT4 weights
    steps of up to 6 rows take about as long as of one, 8 rows 1.4 times as long. Raises UserError where they
    are out of range, or a draft comes without its tokenizer.
    """

    draft: XverseForCausalLM | None = None
    draft_tokenizer: Tokenizer | None = None
    max_tokens: int = 5

    def __post_init__(self) -> None:
        if not 1 <= self.max_tokens <= MOST_TOKENS:
            raise UserError(f"max_tokens: {self.max_tokens} guesses are out of range (1 to {MOST_TOKENS})")
        if (self.draft is None) != (self.draft_tokenizer is None):
            raise UserError("draft: a draft model and its tokenizer belong together, one of them is missing")


class Proposer(Protocol):
    """``cost``: of making one guess, as a share of a step of the model."""

    cost: float

    def propose(self, asked: Many[tuple[Sequence, int]]) -> list[list[int]]:
        """For each sequence up to so many tokens that may follow its own."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        ...


def row_cost(cache_share: float) -> float:
    """Of one more token in a step, where ``cache_share`` of what a step reads is the sequence's cache."""
    return _ROW_COST + _ROW_READS * cache_share


def guesses(acceptance: float, cost: float, most: int, second_row: float = 0.0) -> int:
    """The number of guesses, 0 to ``most``, with the most tokens for each unit of time.

    Of k guesses, each right with probability ``acceptance``, come (1 - a^(k+1)) / (1 - a) tokens (Leviathan
    et al., equation 1), in 1 + ``second_row`` + k · ``cost`` steps.
    """
    best, best_rate = 0, 1.0
    expected, power = 1.0, 1.0
    for count in range(1, most + 1):
        power *= acceptance
        expected += power
        rate = expected / (1 + second_row + count * cost)
        if rate > best_rate:
            best, best_rate = count, rate
    return best


def learn(sequence: Sequence, proposed: int, accepted: int) -> None:
    """Bring the running mean of acceptance up to date after a step."""
    if not proposed:
        sequence.acceptance += _FORGETTING * (_HOPE - sequence.acceptance)
    for right in [1.0] * accepted + [0.0] * (accepted < proposed):
        sequence.acceptance += _SMOOTHING * (right - sequence.acceptance)


class Lookup:
    """The text repeats itself: what followed the last tokens where they stood before follows again.

    Prompt lookup decoding (Saxena, 2023). Two sizes of n-grams; the longer one is the better witness.
    """

    cost = 0.0
    _SIZES = (4, 2)

    def __init__(self) -> None:
        self._seen: dict[int, _Ngrams] = {}

    def propose(self, asked: Many[tuple[Sequence, int]]) -> list[list[int]]:
        found = []
        for sequence, count in asked:
            ngrams = self._seen.get(sequence.handle)
            if ngrams is None:
                ngrams = self._seen[sequence.handle] = _Ngrams(self._SIZES)
            found.append(ngrams.continuation(sequence.tokens, count))
        return found

    def forget(self, sequence: Sequence) -> None:
        self._seen.pop(sequence.handle, None)


class _Ngrams:
    """Where each n-gram of a growing text was last followed by something."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self._ends: list[tuple[int, dict[tuple[int, ...], int]]] = [(size, {}) for size in sizes]
        self._known = 0  # tokens that may end an n-gram

    def continuation(self, tokens: list[int], count: int) -> list[int]:
        for size, ends in self._ends:
            for end in range(max(self._known, size), len(tokens)):
                ends[tuple(tokens[end - size : end])] = end
        self._known = len(tokens)
        for size, ends in self._ends:
            before = ends.get(tuple(tokens[-size:]))
            if before is not None:
                # What lies beyond the end of the text is taken to repeat at the same distance.
                distance = len(tokens) - before
                return [tokens[before + index % distance] for index in range(count)]
        return []


class Draft:
    """A small model of the same tokenizer decodes greedily ahead, with a cache of its own."""

    def __init__(
        self,
        model: XverseForCausalLM,
        cost: float,
        *,
        blocks: int,
        sequences: int,
        vocab_size: int,
        prefill_chunk: int,
    ) -> None:
        self.cost = cost
        self._model = model.eval()
        use_kernels(model)
        weight = model.model.norm.weight
        self._cache = PagedCache(
            model.config, weight.dtype, weight.device, blocks=blocks, sequences=sequences
        )
        self._positions = model.config.context_length
        self._vocab_size = vocab_size
        self._chunk = prefill_chunk
        self._states: dict[int, _DraftState] = {}

    def propose(self, asked: Many[tuple[Sequence, int]]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in asked]
        active: list[tuple[_DraftState, list[int], int]] = []
        for (sequence, count), guessed in zip(asked, found, strict=True):
            state = self._ready(sequence, count)
            if state is not None:
                active.append((state, guessed, count))
        while active:
            # Of each the tokens that its cache lacks: many at first, then the one guessed last.
            segments = [(state.cache, state.lacking(guessed)[: self._chunk]) for state, guessed, _ in active]
            tokens = [token for _, part in segments for token in part]
            context = RaggedContext([(cache, len(part)) for cache, part in segments])
            device = context.positions.device
            hidden = self._model.model(torch.tensor([tokens], device=device), context)[0]  # [N, D]
            ends = torch.tensor([len(part) for _, part in segments], device=device).cumsum(0) - 1
            best = self._model.lm_head(hidden[ends])[:, : self._vocab_size].argmax(dim=-1).tolist()  # [B]
            for (state, guessed, _), (cache, part), token in zip(active, segments, best, strict=True):
                cache.length += len(part)
                state.fed += part
                if not state.lacking(guessed):
                    guessed.append(token)
            active = [item for item in active if len(item[1]) < item[2]]
        return found

    def forget(self, sequence: Sequence) -> None:
        state = self._states.pop(sequence.handle, None)
        if state is not None:
            state.cache.release()

    def _ready(self, sequence: Sequence, count: int) -> _DraftState | None:
        """The sequence's state with room for ``count`` guesses; None where there is none."""
        length = len(sequence.tokens) + count
        state = self._states.get(sequence.handle)
        if state is None:
            if length > self._positions or not self._cache.free_rows:
                return None
            state = self._states[sequence.handle] = _DraftState(
                SequenceCache(self._cache, sequence.tokens_at_most)
            )
        state.follow(sequence.tokens)
        if length > self._positions or state.cache.missing(length) > self._cache.pool.free:
            self.forget(sequence)
            return None
        state.cache.reserve(length)
        return state


class _DraftState:
    def __init__(self, cache: SequenceCache) -> None:
        self.cache = cache
        self.fed: list[int] = []  # what the cache holds: tokens of the text, then guesses
        self._tokens: list[int] = []

    def follow(self, tokens: list[int]) -> None:
        """The text goes on in ``tokens``: what was guessed differently is forgotten."""
        same = min(len(self._tokens), len(self.fed))
        while same < min(len(self.fed), len(tokens) - 1) and self.fed[same] == tokens[same]:
            same += 1
        same = min(same, len(tokens) - 1)
        del self.fed[same:]
        self.cache.length = same
        self._tokens = list(tokens)

    def lacking(self, guessed: list[int]) -> list[int]:
        at = len(self.fed)
        known = len(self._tokens)
        return self._tokens[at:] + guessed if at < known else guessed[at - known :]


def proposer(
    speculation: Speculation,
    model: XverseForCausalLM,
    tokenizer: Tokenizer,
    *,
    cache_tokens: int,
    max_batch: int,
    prefill_chunk: int,
) -> Proposer:
    """What guesses for ``model``. Raises UserError for a draft of another tokenizer."""
    if speculation.draft is None or speculation.draft_tokenizer is None:
        return Lookup()
    if speculation.draft_tokenizer.hash != tokenizer.hash:
        raise UserError(
            f"draft: its tokenizer ({speculation.draft_tokenizer.vocab_size} tokens) is not the model's "
            f"({tokenizer.vocab_size} tokens): their ids mean different text"
        )
    draft = speculation.draft
    size = sum(parameter.nbytes for parameter in draft.state_dict().values())
    whole = sum(parameter.nbytes for parameter in model.state_dict().values())
    return Draft(
        draft,
        size / whole,
        blocks=-(-cache_tokens // BLOCK_SIZE) + max_batch,
        sequences=max_batch,
        vocab_size=tokenizer.vocab_size,
        prefill_chunk=prefill_chunk,
    )
