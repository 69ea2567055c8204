"""Samplers as plain callables: each takes a row of logits and returns it changed.

Definitions and order (bias, penalties, temperature, top-k, top-p, min-p) are those of transformers'
``generate``; presence and frequency penalties are OpenAI's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from xverse.engine.request import Sampling

Sampler = Callable[[Tensor], Tensor]  # float32 [V] -> float32 [V]

_GREEDY_BELOW = 1e-5  # a temperature so low is the limit that it tends to, and would overflow


def is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature < _GREEDY_BELOW


class Counts:
    """How often each token came in the prompt and in the reply of one request, int32 [V] each.

    They exist where a penalty needs them only.
    """

    def __init__(
        self, sampling: Sampling, prompt_ids: Sequence[int], size: int, device: torch.device
    ) -> None:
        self.seen: Tensor | None = None
        self.said: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(size, dtype=torch.bool, device=device)
            self.seen[torch.as_tensor(prompt_ids, device=device)] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            self.said = torch.zeros(size, dtype=torch.int32, device=device)

    def add(self, token: int) -> None:
        """One more token of the reply."""
        if self.seen is not None:
            self.seen[token] = True
        if self.said is not None:
            self.said[token] += 1


def samplers(sampling: Sampling, counts: Counts) -> list[Sampler]:
    """The steps that ``sampling`` asks for; ``counts`` are kept up to date by the caller."""
    steps: list[Sampler] = []
    if sampling.logit_bias:
        steps.append(logit_bias(sampling.logit_bias))
    if counts.seen is not None:
        steps.append(repetition_penalty(sampling.repetition_penalty, counts.seen))
    if counts.said is not None:
        steps.append(reply_penalties(sampling.presence_penalty, sampling.frequency_penalty, counts.said))
    if is_greedy(sampling):
        return steps
    if sampling.temperature != 1:
        steps.append(temperature(sampling.temperature))
    if sampling.top_k:
        steps.append(top_k(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(top_p(sampling.top_p))
    if sampling.min_p:
        steps.append(min_p(sampling.min_p))
    return steps


def choose(logits: Tensor, steps: Sequence[Sampler], generator: torch.Generator | None) -> int:
    """The next token from ``logits`` float32 [V]: drawn with ``generator``, or the greatest without one.

    Raises ValueError where the steps leave no token.
    """
    for step in steps:
        logits = step(logits)
    if generator is None:
        value, token = logits.max(dim=-1)
        if value.item() == -torch.inf:
            raise ValueError("every token is forbidden")
        return int(token)
    alive = (logits > -torch.inf).nonzero().squeeze(1)  # [K]: drawing is what costs, and few are left
    if not len(alive):
        raise ValueError("every token is forbidden")
    drawn = torch.multinomial(logits[alive].softmax(dim=-1), 1, generator=generator)
    return int(alive[drawn])


def logit_bias(biases: Mapping[int, float]) -> Sampler:
    """Add a number to the scores of some tokens."""
    tokens, values = torch.tensor(list(biases)), torch.tensor(list(biases.values()), dtype=torch.float32)

    def apply(logits: Tensor) -> Tensor:
        return logits.index_add(0, tokens.to(logits.device), values.to(logits.device))

    return apply


def repetition_penalty(penalty: float, seen: Tensor) -> Sampler:
    """Scores of tokens in prompt or reply are divided by ``penalty``, negative ones multiplied (CTRL)."""

    def apply(logits: Tensor) -> Tensor:
        penalised = torch.where(logits < 0, logits * penalty, logits / penalty)  # [V]
        return torch.where(seen, penalised, logits)

    return apply


def reply_penalties(presence: float, frequency: float, said: Tensor) -> Sampler:
    """Scores of tokens in the reply fall by ``presence`` once and by ``frequency`` each time they came."""
    return lambda logits: logits - presence * (said > 0) - frequency * said


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
        alive = (logits > -torch.inf).nonzero().squeeze(1)  # [K]: few after top-k, and sorting is what costs
        values, order = logits[alive].sort()
        removed = values.softmax(dim=-1).cumsum(dim=-1) <= 1 - p  # [K], the least probable come first
        removed[-1:] = False
        return logits.index_fill(0, alive[order[removed]], -torch.inf)

    return apply


def min_p(p: float) -> Sampler:
    """Keep the tokens at least ``p`` times as probable as the most probable one (arXiv:2407.01082)."""
    least = torch.tensor(p).log().item()
    return lambda logits: logits.masked_fill(logits < logits.max() + least, -torch.inf)
