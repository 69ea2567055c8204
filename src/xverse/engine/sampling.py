"""Choosing the next token: plain functions over rows of logits, for all rows with equal parameters at once.

Definitions and order (bias, penalties, temperature, top-k, top-p, min-p) are those of transformers'
``generate``; presence and frequency penalties are OpenAI's. Rows are narrowed to their best candidates, in
descending order, because a draw considers few of the vocabulary's entries; a row for which they do not
suffice is sorted. The choice in a row depends on that row and its random numbers alone. Only ``redraw`` waits
for the device.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from xverse.engine.sampling_params import NEUTRAL, PARAMS, SamplingParams

_GREEDY_BELOW = 1e-5  # dividing by a smaller temperature would overflow
_TIES = 16  # candidates beyond top-k, for ties with the last one
_FEW, _BLOCK = 16_384, 256  # weights in one cumulative sum; of more than that, those summed together first
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


class Dice:
    """The random numbers of one request, uniform in [0, 1): a function of its seed alone, on every device.

    They are drawn on the CPU, many at a time, so that a step uploads those of all its rows together.
    """

    def __init__(self, seed: int | None) -> None:
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self._drawn: list[float] = []
        self._next = 0

    def __getitem__(self, index: int) -> float:
        """The ``index``-th number that has not been used."""
        while self._next + index >= len(self._drawn):
            self._drawn = self._drawn[self._next :] + torch.rand(64, generator=self._generator).tolist()
            self._next = 0
        return self._drawn[self._next + index]

    def use(self, count: int) -> None:
        self._next += count


class Adjustment:
    """Biases and penalties on the logits of single tokens of one request.

    ``add`` registers each token of the reply. Only tokens of the prompt and the reply are stored, on the CPU.
    """

    def __init__(self, sampling: SamplingParams, prompt_ids: Sequence[int]) -> None:
        # Penalties count the tokens of the reply; the repetition penalty also covers the prompt.
        self._counting = _penalties(sampling) != _penalties(NEUTRAL)
        prompt = dict.fromkeys(prompt_ids if sampling.repetition_penalty != 1 else ())
        self._indices = {token: index for index, token in enumerate(prompt)}
        self._ids = array("q", prompt)
        self._occurrences = array("f", bytes(4 * len(prompt)))  # in the reply
        self.bias = sampling.logit_bias

    def __bool__(self) -> bool:
        return self._counting or bool(self.bias)

    def add(self, token: int) -> None:
        """One more token of the reply."""
        if not self._counting:
            return
        index = self._indices.setdefault(token, len(self._ids))
        if index == len(self._ids):
            self._ids.append(token)
            self._occurrences.append(0.0)
        self._occurrences[index] += 1

    def counts(self, more: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 [S] and their numbers in the reply float32 [S], if it goes on with ``more``."""
        ids, occurrences = np.array(self._ids, dtype=np.int64), np.array(self._occurrences, dtype=np.float32)
        if not self._counting or not more:
            return ids, occurrences
        known = [self._indices[token] for token in more if token in self._indices]
        np.add.at(occurrences, known, 1)
        new, times = np.unique([token for token in more if token not in self._indices], return_counts=True)
        return np.append(ids, new.astype(np.int64)), np.append(occurrences, times.astype(np.float32))


def adjust_(
    logits: Tensor,
    sampling: SamplingParams,
    adjustments: Sequence[Adjustment],
    more: Sequence[Sequence[int]] | None = None,
) -> None:
    """Apply biases and penalties to ``logits`` float32 [G, V] in place; ``sampling`` holds for all rows,
    but its biases. ``more`` are tokens of each row's reply that are not registered yet."""
    flat, size, device = logits.view(-1), logits.shape[-1], logits.device
    biases = [
        (row * size + token, value)
        for row, adjustment in enumerate(adjustments)
        for token, value in adjustment.bias.items()
    ]
    if biases:
        places, values = zip(*biases, strict=True)
        flat.index_add_(0, upload(places, torch.long, device), upload(values, torch.float32, device))
    pairs = [adjustment.counts(more[row] if more else ()) for row, adjustment in enumerate(adjustments)]
    indices = upload(np.concatenate([ids + row * size for row, (ids, _) in enumerate(pairs)]), None, device)
    if not len(indices):
        return
    scores = flat[indices]  # [S]
    penalty = sampling.repetition_penalty
    if penalty != 1:
        scores = torch.where(scores < 0, scores * penalty, scores / penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        times = upload(np.concatenate([occurrences for _, occurrences in pairs]), None, device)
        scores -= sampling.presence_penalty * (times > 0) + sampling.frequency_penalty * times
    flat[indices] = scores


def upload(
    values: Tensor | np.ndarray | Sequence[float], dtype: torch.dtype | None, device: torch.device
) -> Tensor:
    """``values`` on ``device``, in one copy that does not block."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda" and torch.cuda.is_available():
        tensor = tensor.pin_memory()  # kept by PyTorch until the copy is done
    return tensor.to(device, non_blocking=True)


FORBIDDEN, UNDECIDED = -1, -3  # instead of a token: none is allowed; only ``redraw`` can tell


def draw(logits: Tensor, sampling: SamplingParams, dice: Sequence[float]) -> Tensor:
    """A token int64 for each row of ``logits`` float32 [G, V], all of one ``key``, from a number in [0, 1)
    each; FORBIDDEN or UNDECIDED instead of some."""
    scores, ids, exact = candidates(logits, sampling)
    tokens = _drawn(scores, ids, upload(dice, torch.float64, logits.device))
    return tokens if exact is None else torch.where(exact, tokens, UNDECIDED)


def redraw(logits: Tensor, sampling: SamplingParams, die: float) -> int:
    """The token of an UNDECIDED row, float32 [V]."""
    scores, ids = all_candidates(logits[None], sampling)
    return int(_drawn(scores, ids, upload([die], torch.float64, logits.device)))


def _drawn(scores: Tensor, ids: Tensor | None, dice: Tensor) -> Tensor:
    """``scores`` [G, K] of candidates ``ids`` [G, K] (None: the vocabulary) and ``dice`` float64 [G] → tokens
    int64 [G]."""
    weights = scores.softmax(dim=-1)  # [G, K]
    if weights.shape[-1] <= _FEW:  # decided by K alone, so that a row's draw is the same in any batch
        indices = _first_reaching(weights.cumsum(dim=-1, dtype=torch.float64), 1 - dice[:, None])
    else:  # sums of blocks, then those within the block of each row, because cumulative sums of all are slow
        blocks = pad(weights, (0, -weights.shape[-1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))
        ends = blocks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)  # [G, blocks]
        block = _first_reaching(ends, 1 - dice[:, None])
        inside = blocks.take_along_dim(block[..., None], dim=1)[:, 0].cumsum(dim=-1, dtype=torch.float64)
        inside += pad(ends, (1, 0)).gather(-1, block)  # [G, _BLOCK]
        point = torch.minimum((1 - dice[:, None]) * ends[:, -1:], inside[:, -1:])
        indices = (inside < point).sum(dim=-1, keepdim=True) + block * _BLOCK
        indices = indices.clamp(max=scores.shape[-1] - 1)  # NaN
    tokens = (indices if ids is None else ids.gather(-1, indices))[:, 0]
    return torch.where(scores.amax(dim=-1) > -torch.inf, tokens, FORBIDDEN)


def _first_reaching(sums: Tensor, share: Tensor) -> Tensor:
    """The place int64 [G, 1] of the first of the cumulative ``sums`` [G, N] that reaches a ``share`` [G, 1]
    of the last; the shares are in (0, 1], so that nothing of weight 0 is chosen."""
    places = (sums < share * sums[:, -1:]).sum(dim=-1, keepdim=True)
    return places.clamp(max=sums.shape[-1] - 1)


def greedy(logits: Tensor) -> Tensor:
    """The best token int64 of each row of ``logits`` [G, V]; FORBIDDEN if there is none."""
    best, tokens = logits.max(dim=-1)
    return torch.where(best == -torch.inf, FORBIDDEN, tokens)


def candidates(logits: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows of ``logits`` float32 [G, V] after temperature, top-k, top-p and min-p: scores [G, K] (excluded
    candidates: -inf), ids [G, K] (None: the vocabulary), and bool [G] whether a row needs no other candidates
    (None: no row does)."""
    size = logits.shape[-1]
    k = min(sampling.top_k, size)
    if not k and sampling.top_p == 1:
        scores = temperature(logits, logits.amax(dim=-1, keepdim=True), sampling.temperature)
        return min_p(scores, sampling.min_p), None, None
    take = min(k + _TIES if k else _NUCLEUS, size)
    values, ids = logits.topk(take, dim=-1)  # [G, K], descending
    top = values[:, :1]
    total: Tensor | None = None
    exact: Tensor | None = None
    if k:
        if take < size:  # not all ties at top-k are among them
            exact = values[:, -1] < values[:, k - 1]
        values = keep_top_k(values, k)
    elif take < size:
        scores = temperature(logits, top, sampling.temperature)
        total = scores.double().logsumexp(dim=-1, keepdim=True)  # [G, 1]
        shares = (temperature(values, top, sampling.temperature) - total).exp().sum(dim=-1)
        exact = shares > sampling.top_p + 1e-4  # the nucleus is among them
    return _scored(values, top, total, sampling), ids, exact


def all_candidates(logits: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """As ``candidates``, with the whole vocabulary in descending order: scores and ids [G, V]."""
    values, ids = logits.sort(dim=-1, descending=True)
    top = values[:, :1]
    if sampling.top_k:
        values = keep_top_k(values, min(sampling.top_k, values.shape[-1]))
    return _scored(values, top, None, sampling), ids


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
    return scores if p == 0 else scores.masked_fill(scores < math.log(p), -torch.inf)
