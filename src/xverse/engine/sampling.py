"""Choosing the next token: plain functions over rows of logits, for all rows with equal parameters at once.

Definitions and order (bias, penalties, temperature, top-k, top-p, min-p) are those of transformers'
``generate``; presence and frequency penalties are OpenAI's. Rows are narrowed to their best candidates, in
descending order, as soon as the result is known to be exact, because a draw considers few of the vocabulary's
entries. The choice in a row depends on that row and its generator alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from xverse.engine.sampling_params import NEUTRAL, PARAMS, SamplingParams

_GREEDY_BELOW = 1e-5  # dividing by a smaller temperature would overflow
_TIES = 16  # candidates beyond top-k, for ties with the last one
_NUCLEUS = 1024  # candidates in which top-p is searched first

Key = tuple[float, ...]
# All parameters that change a distribution; the others may differ among rows that are drawn together.
_distribution = attrgetter(
    *(name for name in PARAMS if name not in ("seed", "max_new_tokens", "stop", "logit_bias"))
)
_penalties = attrgetter("repetition_penalty", "presence_penalty", "frequency_penalty")


def is_greedy(sampling: SamplingParams) -> bool:
    return sampling.temperature < _GREEDY_BELOW


def key(sampling: SamplingParams) -> Key:
    """Requests with equal keys can be drawn together."""
    return _distribution(sampling)


class Adjustment:
    """Biases and penalties on the logits of single tokens of one request.

    ``add`` registers each token of the reply. Only tokens of the prompt and the reply are stored.
    """

    def __init__(self, sampling: SamplingParams, prompt_ids: Sequence[int], device: torch.device) -> None:
        # Penalties count the tokens of the reply; the repetition penalty also covers the prompt.
        self._counting = _penalties(sampling) != _penalties(NEUTRAL)
        prompt = dict.fromkeys(prompt_ids if sampling.repetition_penalty != 1 else ())
        self._indices = {token: index for index, token in enumerate(prompt)}
        self.count = len(prompt)
        self.ids = torch.tensor(list(prompt), dtype=torch.long, device=device)
        self.occurrences = torch.zeros(self.count, device=device)  # in the reply
        self.bias: tuple[Tensor, Tensor] | None = None
        if sampling.logit_bias:
            values = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32, device=device)
            self.bias = torch.tensor(list(sampling.logit_bias), device=device), values

    def __bool__(self) -> bool:
        return self._counting or self.bias is not None

    def add(self, token: int) -> None:
        """One more token of the reply."""
        if not self._counting:
            return
        index = self._indices.setdefault(token, self.count)
        if index == self.count:
            self.count += 1
            if index == len(self.ids):
                room = max(64, len(self.ids))
                self.ids = torch.cat((self.ids, self.ids.new_zeros(room)))
                self.occurrences = torch.cat((self.occurrences, self.occurrences.new_zeros(room)))
            self.ids[index] = token
        self.occurrences[index] += 1


def adjust_(logits: Tensor, sampling: SamplingParams, adjustments: Sequence[Adjustment]) -> None:
    """Apply biases and penalties to ``logits`` float32 [G, V] in place; ``sampling`` holds for all rows."""
    flat, size = logits.view(-1), logits.shape[-1]
    ids, occurrences, counts = [], [], []
    for row, adjustment in zip(logits, adjustments, strict=True):
        if adjustment.bias is not None:
            row.index_add_(0, *adjustment.bias)
        count = adjustment.count
        ids.append(adjustment.ids[:count])
        occurrences.append(adjustment.occurrences[:count])
        counts.append(count)
    if not any(counts):
        return
    first = torch.arange(0, len(flat), size, device=logits.device)
    indices = torch.cat(ids) + first.repeat_interleave(torch.tensor(counts, device=logits.device))  # [S]
    scores = flat[indices]
    penalty = sampling.repetition_penalty
    if penalty != 1:
        scores = torch.where(scores < 0, scores * penalty, scores / penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        times = torch.cat(occurrences)
        scores -= sampling.presence_penalty * (times > 0) + sampling.frequency_penalty * times
    flat[indices] = scores


def choose(
    logits: Tensor,
    sampling: SamplingParams,
    adjustments: Sequence[Adjustment],
    generators: Sequence[torch.Generator | None],
) -> list[int]:
    """A token for each row of ``logits`` [G, V], all of one ``key``; -1 if every token is forbidden."""
    logits = logits.float()
    if any(adjustments):
        logits = logits.clone()
        adjust_(logits, sampling, adjustments)
    if is_greedy(sampling):
        best, tokens = logits.max(dim=-1)
        return [
            -1 if value == -torch.inf else token
            for value, token in zip(best.tolist(), tokens.tolist(), strict=True)
        ]
    chosen = [-1] * len(logits)
    for rows, scores, ids in candidates(logits, sampling):
        weights = scores.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)  # [R, K]
        dice = [torch.rand(1, generator=generators[row], device=logits.device) for row in rows]
        # A point in (0, 1] of the sum, so that a token of weight 0 is never drawn.
        point = (1 - torch.cat(dice).double())[:, None] * weights[:, -1:]
        indices = (weights < point).sum(dim=-1, keepdim=True)  # [R, 1]
        tokens = indices if ids is None else ids.gather(-1, indices.clamp(max=ids.shape[-1] - 1))
        possible = (scores.amax(dim=-1) > -torch.inf).tolist()
        for row, token, fine in zip(rows, tokens[:, 0].tolist(), possible, strict=True):
            chosen[row] = token if fine else -1
    return chosen


def candidates(logits: Tensor, sampling: SamplingParams) -> list[tuple[list[int], Tensor, Tensor | None]]:
    """Rows of ``logits`` float32 [G, V] after temperature, top-k, top-p and min-p.

    The result comes in parts (row numbers, scores [R, K], ids [R, K]), because rows may need different
    numbers of candidates. Excluded candidates score -inf. With ids None the candidates are the vocabulary.
    """
    rows, size = list(range(len(logits))), logits.shape[-1]
    k = min(sampling.top_k, size)
    if not k and sampling.top_p == 1:
        scores = temperature(logits, logits.amax(dim=-1, keepdim=True), sampling.temperature)
        return [(rows, min_p(scores, sampling.min_p), None)]
    take = min(k + _TIES if k else _NUCLEUS, size)
    values, ids = logits.topk(take, dim=-1)  # [G, K], descending
    top = values[:, :1]
    total: Tensor | None = None
    exact = [True] * len(rows)
    if k:
        if take < size:
            exact = (values[:, -1] < values[:, k - 1]).tolist()
        values = keep_top_k(values, k)
    elif take < size:
        scores = temperature(logits, top, sampling.temperature)
        total = scores.double().logsumexp(dim=-1, keepdim=True)  # [G, 1]
        shares = (temperature(values, top, sampling.temperature) - total).exp().sum(dim=-1)
        exact = (shares > sampling.top_p + 1e-4).tolist()
    parts: list[tuple[list[int], Tensor, Tensor | None]] = []
    for row in [row for row in rows if not exact[row]]:  # ties at top-k, or a large nucleus
        full, full_ids = logits[row : row + 1].sort(dim=-1, descending=True)
        if k:
            full = keep_top_k(full, k)
        parts.append(([row], _scored(full, full[:, :1], None, sampling), full_ids))
    narrow = [row for row in rows if exact[row]]
    if narrow:
        if parts:
            at = torch.tensor(narrow, device=logits.device)
            values, ids, top = values[at], ids[at], top[at]
            total = None if total is None else total[at]
        parts.append((narrow, _scored(values, top, total, sampling), ids))
    return parts


def _scored(values: Tensor, top: Tensor, total: Tensor | None, sampling: SamplingParams) -> Tensor:
    scores = temperature(values, top, sampling.temperature)
    return min_p(top_p(scores, sampling.top_p, total), sampling.min_p)


def temperature(logits: Tensor, top: Tensor, value: float) -> Tensor:
    """``logits`` [G, K] less the greatest, ``top`` [G, 1], so that nothing overflows, over ``value``."""
    return (logits - top) / value


def keep_top_k(values: Tensor, k: int) -> Tensor:
    """Of descending ``values`` [G, K] keep the first ``k`` and those equal to the last of them."""
    return values.masked_fill(values < values[:, k - 1 : k], -torch.inf)


def top_p(scores: Tensor, p: float, total: Tensor | None = None) -> Tensor:
    """Of descending ``scores`` [G, K] keep the first ones whose probabilities together reach ``p``.

    ``total`` [G, 1] is the logsumexp of the full row; None computes it from ``scores``.
    """
    if p == 1:
        return scores
    if total is None:
        total = scores.double().logsumexp(dim=-1, keepdim=True)
    shares = (scores - total).exp()
    before = shares.cumsum(dim=-1) - shares  # [G, K]
    beyond = before >= p
    beyond[:, 0] = False
    return scores.masked_fill(beyond, -torch.inf)


def min_p(scores: Tensor, p: float) -> Tensor:
    """Of ``scores`` [G, K], whose best is 0, keep those at least ``p`` times as probable as the best."""
    return scores if p == 0 else scores.masked_fill(scores < torch.tensor(p).log().item(), -torch.inf)
