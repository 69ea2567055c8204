"""What goes into the engine and what comes out. Values out of range are refused here, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from xverse.config import UserError

# "stop": a stop id or stop string; "length": max_new_tokens or the context; "error": this request failed.
FinishReason = Literal["stop", "length", "error"]
MOST_ALTERNATIVES = 20  # as many as OpenAI's API gives beside a token

# What ``Sampling`` takes; top_p itself excludes 0.
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_k": (0, 2**31 - 1),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "seed": (0, 2**62),
}


class Constraint(Protocol):
    """What a reply must look like, decided token by token: a grammar, a JSON schema, a given text.

    The engine asks ``apply`` for every token that it chooses and then tells ``accept`` which one it was. What
    is forbidden gets -inf. An exception that either of them raises fails this request alone.
    """

    def apply(self, logits: Tensor) -> Tensor:
        """``logits`` float32 [V], not to be changed → the same with -inf for every forbidden token."""
        ...

    def accept(self, token_id: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen; ``temperature`` 0 is greedy. The defaults change nothing of the distribution.

    ``repetition_penalty`` counts prompt and reply (CTRL, arXiv:1909.05858); ``presence_penalty`` and
    ``frequency_penalty`` count the reply alone, as OpenAI defines them. ``logit_bias`` is added first of all.
    ``seed`` None draws a different sequence each time. Raises UserError for a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # 1: off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            if name != "seed" or self.seed is not None:
                whole = name in ("top_k", "seed")
                _check(name, getattr(self, name), low, high, above=name == "top_p", whole=whole)
        for token, bias in self.logit_bias.items():
            if not _is_whole(token) or token < 0:
                raise UserError(f"logit_bias: {token!r} is not the id of a token")
            _check(f"logit_bias of token {token}", bias, -100, 100)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to continue. Raises UserError for an empty prompt or a value out of range.

    ``logprobs``: how many of the most probable tokens to report beside each chosen one, with their
    log-probabilities; None reports none at all. ``prompt_logprobs``: the same for the prompt's tokens, in the
    first event; only then may ``max_new_tokens`` be 0, which generates nothing.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int = 2048
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: Sequence[int] = (3,)
    stop: Sequence[str] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        if not len(self.prompt_ids):
            raise UserError("prompt_ids: the prompt has no tokens")
        least = 1 if self.prompt_logprobs is None else 0
        _check("max_new_tokens", self.max_new_tokens, least, 2**31 - 1, whole=True)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), 0, MOST_ALTERNATIVES, whole=True)
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError("stop: expected a list of strings that are not empty")


class TokenLogprob(NamedTuple):
    """A token's natural log-probability under the model itself, before sampling values change it, and the
    most probable tokens in its place, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(kw_only=True, slots=True)
class Event:
    """One token of one request, and the text that became certain with it.

    ``text`` may be empty, where a character or a possible stop string is not complete yet; the texts of a
    request joined are its answer, without stop ids and stop strings. The last event has a ``finish_reason``;
    when that is "error", ``error`` says what happened and there is no token. ``logprob`` is there where the
    request asks for it; ``prompt_logprobs``, one for each of the prompt's tokens from the second on, in the
    first event.
    """

    handle: int
    token_id: int | None
    text: str
    logprob: TokenLogprob | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(
    name: str, value: float, low: float, high: float, above: bool = False, whole: bool = False
) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value > high or value < low or (above and value == low):
        bounds = f"above {low}, at most {high}" if above else f"{low} to {high}"
        raise UserError(f"{name}: {value!r} is out of range ({bounds})")
    if whole and not _is_whole(value):
        raise UserError(f"{name}: {value!r} is not a whole number")
