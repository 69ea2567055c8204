"""The state of a request while it waits and runs."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from torch import Tensor

from xverse.engine.adapters import Adapter
from xverse.engine.cache import SequenceCache
from xverse.engine.prefix import extend_digests
from xverse.engine.request import Pooling, Request, TokenLogprob
from xverse.engine.sampling import Adjustment, Dice, Key
from xverse.engine.stop import StopText
from xverse.tokenizer import StreamDecoder


@dataclass(eq=False)
class Prompted:
    """Log-probabilities of a prompt's tokens from index ``start`` on, and of ``finals`` after its last; or
    with ``pooling`` its embedding, of which ``state`` is the part that is computed, float64 [D]."""

    start: int
    alternatives: int = 0
    finals: tuple[int, ...] = ()
    logprobs: list[TokenLogprob] = field(default_factory=list)
    final_logprobs: list[float] = field(default_factory=list)
    final_best: int = -1  # the most probable token at their position
    pooling: Pooling | None = None
    state: Tensor | None = None

    @classmethod
    def of(cls, request: Request) -> Prompted | None:
        """What a request asks for of its prompt."""
        if request.pooling is not None:
            start = len(request.prompt_ids) if request.pooling == "last" else 1
            return cls(start=start, pooling=request.pooling)
        if request.prompt_logprobs is not None:
            return cls(start=request.prompt_start, alternatives=request.prompt_logprobs)
        return None

    def reset(self) -> None:
        """Forget what was computed, because the prompt will be computed again."""
        self.logprobs.clear()
        self.state = None


@dataclass(eq=False, slots=True)
class Sequence:
    """``tokens`` are the prompt and the reply. The cache holds ``computed`` of them, at most all but the
    last; preemption loses nothing else."""

    handle: int
    request: Request
    tokens: list[int]
    most_tokens: int
    text_decoder: StreamDecoder
    stop: StopText
    adjustment: Adjustment
    key: Key
    dice: Dice | None  # None: greedy
    plain: bool  # greedy, without penalties, constraint or log-probabilities
    prompted: Prompted | None
    salt: bytes
    block_size: int
    prompt_tokens: int
    adapter: Adapter | None
    acceptance: float  # share of proposed tokens that were accepted, a running mean
    digests: list[bytes] = field(default_factory=list)
    cache: SequenceCache | None = None
    reused: int = 0  # prompt tokens that the prefix cache had
    registered: int = 0  # blocks that were offered to the prefix cache
    reported: bool = False  # whether an event carried the prompt's log-probabilities

    @property
    def computed(self) -> int:
        return self.cache.length if self.cache else 0

    @property
    def pending(self) -> int:
        """The number of tokens that are not in the cache."""
        return len(self.tokens) - self.computed

    @property
    def scoring(self) -> bool:
        """Whether log-probabilities of the prompt remain to be computed."""
        return self.prompted is not None and not self.reported

    def full_digests(self) -> list[bytes]:
        """Digests of all full blocks of the tokens."""
        extend_digests(self.digests, self.tokens, self.salt, self.block_size)
        return self.digests

    def whole_digest(self) -> bytes | None:
        """The digest of the whole prompt; None if a token follows it or its log-probabilities are needed."""
        if self.scoring or len(self.tokens) > self.prompt_tokens:
            return None
        before = (self.full_digests() or [self.salt])[-1]
        return before + array("q", self.tokens[len(self.digests) * self.block_size :]).tobytes()

    def reusable(self) -> list[bytes]:
        """Digests of the blocks that may come from the prefix cache: all before the first token whose logits
        are needed."""
        first = len(self.tokens) - 1
        if self.prompted is not None and self.scoring:
            first = min(first, self.prompted.start - 1)
        return self.full_digests()[: first // self.block_size]
