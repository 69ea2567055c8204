"""Samplers as plain callables: each takes a row of logits and returns it changed.

Definitions and order (penalty, temperature, top-k, top-p) are those of transformers' ``generate``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xverse.engine.request import Sampling

Sampler = Callable[[Tensor], Tensor]  # float32 [V] -> float32 [V]

_GREEDY_BELOW = 1e-5  # a temperature so low is the limit that it tends to, and would overflow


def is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature < _GREEDY_BELOW


def samplers(sampling: Sampling, seen: Tensor) -> list[Sampler]:
    """The steps that ``sampling`` asks for; ``seen`` bool [V] is kept up to date by the caller."""
    steps: list[Sampler] = []
    if sampling.repetition_penalty != 1:
        steps.append(repetition_penalty(sampling.repetition_penalty, seen))
    if is_greedy(sampling):
        return steps
    if sampling.temperature != 1:
        steps.append(temperature(sampling.temperature))
    if sampling.top_k:
        steps.append(top_k(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(top_p(sampling.top_p))
    return steps


def choose(logits: Tensor, steps: Sequence[Sampler], generator: torch.Generator | None) -> int:
    """The next token from ``logits`` float32 [V]: drawn with ``generator``, or the greatest without one."""
    for step in steps:
        logits = step(logits)
    if generator is None:
        return int(logits.argmax())
    return int(torch.multinomial(logits.softmax(dim=-1), 1, generator=generator))


def repetition_penalty(penalty: float, seen: Tensor) -> Sampler:
    """Scores of tokens in prompt or reply are divided by ``penalty``, negative ones multiplied (CTRL)."""

    def apply(logits: Tensor) -> Tensor:
        penalised = torch.where(logits < 0, logits * penalty, logits / penalty)  # [V]
        return torch.where(seen, penalised, logits)

    return apply


def temperature(value: float) -> Sampler:
    """Divide by ``value``; the greatest logit is moved to 0 first, so that nothing overflows."""
    return lambda logits: (logits - logits.max()) / value


def top_k(k: int) -> Sampler:
    """Keep the ``k`` greatest, and what equals the last of them."""

    def apply(logits: Tensor) -> Tensor:
        last = logits.topk(min(k, len(logits))).values[-1]
        return logits.masked_fill(logits < last, -torch.inf)

    return apply


def top_p(p: float) -> Sampler:
    """Keep the most probable tokens whose probabilities reach ``p`` together; at least one."""

    def apply(logits: Tensor) -> Tensor:
        alive = logits.isfinite().nonzero().squeeze(1)  # [K]: few after top-k, and sorting is what costs
        values, order = logits[alive].sort()
        removed = values.softmax(dim=-1).cumsum(dim=-1) <= 1 - p  # [K], the least probable come first
        removed[-1:] = False
        return logits.index_fill(0, alive[order[removed]], -torch.inf)

    return apply
