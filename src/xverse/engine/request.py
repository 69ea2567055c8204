"""What goes into the engine and what comes out. Values out of range are refused here, by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from xverse.config import UserError

# "stop": a stop id or stop string; "length": max_new_tokens or the context; "error": this request failed.
FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen; ``temperature`` 0 is greedy. The defaults change nothing of the distribution.

    Raises UserError for a value out of range. ``seed`` None draws a different sequence each time.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    repetition_penalty: float = 1.0  # 1: off
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0, 100)
        _check("top_k", self.top_k, 0, 2**31 - 1)
        _check("top_p", self.top_p, 0, 1, above=True)
        _check("repetition_penalty", self.repetition_penalty, 0.01, 100)
        if self.seed is not None:
            _check("seed", self.seed, 0, 2**63 - 1)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to continue. Raises UserError for an empty prompt or a value out of range."""

    prompt_ids: Sequence[int]
    max_new_tokens: int = 2048
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: Sequence[int] = (3,)
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not len(self.prompt_ids):
            raise UserError("prompt_ids: the prompt has no tokens")
        _check("max_new_tokens", self.max_new_tokens, 1, 2**31 - 1)
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError("stop: expected a list of strings that are not empty")


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One step of one request: the token that was chosen and the text that became certain with it.

    ``text`` may be empty, where a character or a possible stop string is not complete yet; the texts of a
    request joined are its answer, without stop ids and stop strings. ``logprob`` is the token's natural
    log-probability under the model itself, before sampling values change it. The last event has a
    ``finish_reason``; when that is "error", ``error`` says what happened and there is no token.
    """

    handle: int
    token_id: int | None
    text: str
    logprob: float | None
    finish_reason: FinishReason | None = None
    error: str | None = None


def _check(name: str, value: float, low: float, high: float, above: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value > high or value < low or (above and value == low):
        bounds = f"above {low}, at most {high}" if above else f"{low} to {high}"
        raise UserError(f"{name}: {value!r} is out of range ({bounds})")
