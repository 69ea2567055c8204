"""A request while it waits and runs: its tokens, where its cache stands, what has been said of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from xverse.engine.cache import BLOCK_SIZE, SequenceCache
from xverse.engine.prefix import extend_digests
from xverse.engine.request import Request, TokenLogprob
from xverse.engine.sampling import Adjustment, Key
from xverse.engine.stop import StopText
from xverse.tokenizer import StreamDecoder


@dataclass(eq=False)
class Prompted:
    """Log-probabilities of a prompt's tokens from index ``start`` on, and of ``finals`` behind its last."""

    start: int
    alternatives: int = 0
    finals: tuple[int, ...] = ()
    found: list[TokenLogprob] = field(default_factory=list)
    final_logprobs: list[float] = field(default_factory=list)
    final_best: int = -1  # the likeliest token in their place


@dataclass(eq=False, slots=True)
class Sequence:
    """``tokens`` are the prompt and what was generated; the cache holds ``computed`` of them, at most all but
    the last. Nothing but the cache is lost when the sequence is preempted."""

    handle: int
    request: Request
    tokens: list[int]
    tokens_at_most: int
    decoder: StreamDecoder
    stop: StopText
    adjustment: Adjustment
    key: Key
    generator: torch.Generator | None
    plain: bool  # the greatest logit is its next token, and nothing else is asked
    prompted: Prompted | None
    salt: bytes
    prompt_tokens: int
    acceptance: float  # share of guesses that were right, a running mean
    digests: list[bytes] = field(default_factory=list)
    cache: SequenceCache | None = None
    registered: int = 0  # blocks that were offered to the prefix cache
    reported: bool = False  # whether an event carried the prompt's log-probabilities

    @property
    def computed(self) -> int:
        return self.cache.length if self.cache else 0

    @property
    def pending(self) -> int:
        """How many of the tokens are not in the cache."""
        return len(self.tokens) - self.computed

    @property
    def scoring(self) -> bool:
        """Whether log-probabilities of the prompt are still to be found."""
        return self.prompted is not None and not self.reported

    def full_digests(self) -> list[bytes]:
        """Digests of all full blocks of the tokens."""
        extend_digests(self.digests, self.tokens, self.salt)
        return self.digests

    def reusable(self) -> list[bytes]:
        """Those of the blocks that need not be computed where they are at hand: all before the first token
        whose logits are needed."""
        first = len(self.tokens) - 1
        if self.prompted is not None and self.scoring:
            first = min(first, self.prompted.start - 1)
        return self.full_digests()[: first // BLOCK_SIZE]
