"""Who guesses what a text says next: the text itself, or a small model."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Protocol

import torch

from xverse.engine.cache import PagedCache, RaggedContext, SequenceCache
from xverse.engine.sequence import Sequence
from xverse.kernels.inference import use_kernels
from xverse.model.transformer import XverseForCausalLM


class Proposer(Protocol):
    """``cost``: of making one guess, as a share of a step of the model."""

    cost: float

    def propose(self, asked: Many[tuple[Sequence, int]]) -> list[list[int]]:
        """For each sequence up to so many tokens that may follow its own."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        ...


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
