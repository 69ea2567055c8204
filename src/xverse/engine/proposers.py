"""Proposers of tokens for speculative decoding: n-gram lookup in the text itself, and a draft model."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Protocol

import torch

from xverse.engine.cache import PagedCache, RaggedContext, SequenceCache
from xverse.engine.sequence import Sequence
from xverse.kernels.inference import use_kernels
from xverse.model.transformer import XverseForCausalLM


class Proposer(Protocol):
    """``cost`` is that of proposing one token, as a share of a step of the model."""

    cost: float

    def propose(self, counts: Many[tuple[Sequence, int]]) -> list[list[int]]:
        """For each sequence, up to the given number of tokens that may follow its own."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """Drop the state of a sequence that has ended."""
        ...


class NgramProposer:
    """Prompt lookup decoding (Saxena, 2023): proposes what followed the last occurrence of the final n-gram.

    There are two sizes of n-grams. The longer one predicts better and is tried first.
    """

    cost = 0.0
    _SIZES = (4, 2)

    def __init__(self) -> None:
        self._ngrams: dict[int, _Ngrams] = {}

    def propose(self, counts: Many[tuple[Sequence, int]]) -> list[list[int]]:
        proposals = []
        for sequence, count in counts:
            ngrams = self._ngrams.get(sequence.handle)
            if ngrams is None:
                ngrams = self._ngrams[sequence.handle] = _Ngrams(self._SIZES)
            proposals.append(ngrams.continuation(sequence.tokens, count))
        return proposals

    def forget(self, sequence: Sequence) -> None:
        self._ngrams.pop(sequence.handle, None)


class _Ngrams:
    """The end of the last occurrence of each n-gram of a growing text, its final one excepted."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self._ends: list[tuple[int, dict[tuple[int, ...], int]]] = [(size, {}) for size in sizes]
        self._indexed = 0  # tokens up to which n-grams are indexed

    def continuation(self, tokens: list[int], count: int) -> list[int]:
        for size, ends in self._ends:
            for end in range(max(self._indexed, size), len(tokens)):
                ends[tuple(tokens[end - size : end])] = end
        self._indexed = len(tokens)
        for size, ends in self._ends:
            end_before = ends.get(tuple(tokens[-size:]))
            if end_before is not None:
                # Beyond the end of the text, repeat with the same period.
                distance = len(tokens) - end_before
                return [tokens[end_before + index % distance] for index in range(count)]
        return []


class DraftModelProposer:
    """A small model with the same tokenizer that decodes ahead greedily, in a separate cache."""

    def __init__(
        self,
        model: XverseForCausalLM,
        cost: float,
        *,
        device: torch.device,
        blocks: int,
        sequences: int,
        vocab_size: int,
        prefill_chunk: int,
    ) -> None:
        self.cost = cost
        self._model = model.eval().to(device)
        use_kernels(model)
        weight = model.model.norm.weight
        self._cache = PagedCache(
            model.config, weight.dtype, weight.device, blocks=blocks, sequences=sequences
        )
        self._positions = model.config.context_length
        self._vocab_size = vocab_size
        self._chunk = prefill_chunk
        self._states: dict[int, _DraftState] = {}

    def propose(self, counts: Many[tuple[Sequence, int]]) -> list[list[int]]:
        proposals: list[list[int]] = [[] for _ in counts]
        active: list[tuple[_DraftState, list[int], int]] = []
        for (sequence, count), proposal in zip(counts, proposals, strict=True):
            state = self._prepare(sequence, count)
            if state is not None:
                active.append((state, proposal, count))
        while active:
            # Feed the tokens that each cache lacks: many at first, then the last proposed one.
            segments = [
                (state.cache, state.missing(proposal)[: self._chunk]) for state, proposal, _ in active
            ]
            tokens = [token for _, part in segments for token in part]
            context = RaggedContext([(cache, len(part)) for cache, part in segments])
            device = context.positions.device
            hidden = self._model.model(torch.tensor([tokens], device=device), context)[0]  # [N, D]
            ends = torch.tensor([len(part) for _, part in segments], device=device).cumsum(0) - 1
            best = self._model.lm_head(hidden[ends])[:, : self._vocab_size].argmax(dim=-1).tolist()  # [B]
            for (state, proposal, _), (cache, part), token in zip(active, segments, best, strict=True):
                cache.length += len(part)
                state.fed += part
                if not state.missing(proposal):
                    proposal.append(token)
            active = [entry for entry in active if len(entry[1]) < entry[2]]
        return proposals

    def forget(self, sequence: Sequence) -> None:
        state = self._states.pop(sequence.handle, None)
        if state is not None:
            state.cache.release()

    def _prepare(self, sequence: Sequence, count: int) -> _DraftState | None:
        """The sequence's state with room for ``count`` more tokens; None if they do not fit."""
        length = len(sequence.tokens) + count
        state = self._states.get(sequence.handle)
        if state is None:
            if length > self._positions or not self._cache.free_rows:
                return None
            state = self._states[sequence.handle] = _DraftState(
                SequenceCache(self._cache, sequence.most_tokens)
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
        self.fed: list[int] = []  # the contents of the cache: tokens of the text, then proposed ones
        self._tokens: list[int] = []

    def follow(self, tokens: list[int]) -> None:
        """Update the text to ``tokens``; drop proposed tokens that differ from it."""
        same = min(len(self._tokens), len(self.fed))
        while same < min(len(self.fed), len(tokens) - 1) and self.fed[same] == tokens[same]:
            same += 1
        same = min(same, len(tokens) - 1)
        del self.fed[same:]
        self.cache.length = same
        self._tokens = list(tokens)

    def missing(self, proposal: list[int]) -> list[int]:
        """The tokens of the text and of ``proposal`` that are not in the cache."""
        at, text = len(self.fed), len(self._tokens)
        return self._tokens[at:] + proposal if at < text else proposal[at - text :]
