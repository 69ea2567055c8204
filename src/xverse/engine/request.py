"""What the engine takes and what it returns. Values out of range are refused here, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from torch import Tensor

from xverse.config import UserError
from xverse.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from xverse.engine.adapters import Adapter

# "stop": a stop id or stop text; "length": max_new_tokens or the context; "error": this request failed.
FinishReason = Literal["stop", "length", "error"]
Pooling = Literal["mean", "last"]
MOST_ALTERNATIVES = 20  # as many as OpenAI's API reports per token


class Constraint(Protocol):
    """Restricts a reply token by token: to a grammar, a JSON schema, a given text.

    For each token the engine calls ``allowed``, chooses, and calls ``accept`` with its choice. An exception
    from either fails this request alone.
    """

    def allowed(self) -> Tensor:
        """Which tokens may follow, bool [V] on the CPU."""
        ...

    def accept(self, token_id: int) -> None: ...

    def forced(self) -> Sequence[int]:
        """The next tokens where the text is determined, else none. The engine computes them in one step, and
        verifies each as if it had been computed alone."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to continue. Raises UserError for an empty prompt or a value out of range.

    ``logprobs``: how many of the most probable tokens to report with each chosen one, with their
    log-probabilities; None reports none, not even the chosen one's. ``prompt_logprobs``: the same for the
    prompt's tokens from index ``prompt_start`` on, in the first event. ``pooling``: compute an embedding of
    the prompt instead of a reply, from the mean of its tokens' last hidden states or from the last token's.
    Without ``generate`` the request computes only these. ``adapter``: the LoRA adapter to compute with, if
    any. ``skip_special``: the reply's text omits special tokens. ``tempered``: the reported log-probabilities
    are those after division by the temperature, as policy gradients need them.
    """

    prompt_ids: Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: Sequence[int] = (3,)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_start: int = 1
    pooling: Pooling | None = None
    constraint: Constraint | None = None
    adapter: Adapter | None = None
    generate: bool = True
    skip_special: bool = True
    tempered: bool = False

    def __post_init__(self) -> None:
        if not len(self.prompt_ids):
            raise UserError("prompt_ids: the prompt has no tokens")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 0 <= value <= MOST_ALTERNATIVES):
                raise UserError(f"{name}: {value!r} is out of range (0 to {MOST_ALTERNATIVES})")
        assert 1 <= self.prompt_start <= len(self.prompt_ids), "prompt_start"
        assert not (self.pooling and (self.generate or self.prompt_logprobs is not None)), "pooling"
        assert self.generate or self.pooling or self.prompt_logprobs is not None, "nothing to compute"

    @property
    def max_new_tokens(self) -> int:
        return self.sampling.max_new_tokens if self.generate else 0


class TokenLogprob(NamedTuple):
    """A token's natural log-probability under the model itself, before sampling parameters apply, and the
    most probable tokens at its position, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(kw_only=True, slots=True)
class Event:
    """One token of one request, and the text that it completes.

    ``text`` may be empty while a character or a possible stop text is incomplete; the texts of a request
    joined are its reply, without stop ids and stop texts. The last event has a ``finish_reason``; if that is
    "error", ``error`` is the message, and no token is set. ``stop_text`` is the stop text that ended the
    reply. ``cached_tokens`` of the prompt were found in the prefix cache. ``logprob`` is set if the request
    asks for it; the first event carries ``prompt_logprobs``, one for each prompt token from ``prompt_start``
    on, or the ``embedding`` of unit length.
    """

    handle: int
    token_id: int | None
    text: str
    logprob: TokenLogprob | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    cached_tokens: int = 0
    stop_text: str | None = None
    embedding: list[float] | None = None


@dataclass(frozen=True, kw_only=True)
class Stats:
    """The engine's state in requests and cache blocks, and counters since its start."""

    running: int
    waiting: int
    blocks: int
    free_blocks: int  # without a holder
    cached_blocks: int  # held by the prefix cache, alone or together with requests
    idle_blocks: int  # held by the prefix cache alone
    preemptions: int
    reused_tokens: int  # prompt tokens found in the prefix cache
    proposed_tokens: int
    accepted_tokens: int
