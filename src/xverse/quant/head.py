"""Rounding the head's rows by the contexts in which their tokens are likely.

To second order an error e of the logits costs half the variance of e under the predicted probabilities p: the
logit of a token matters where p (1 - p) is large. Rows of tokens that are likely in similar contexts are
rounded together, by the Hessian of the inputs with these weights. What rows have in common, rare ones above
all, is stored apart as a few centres, so that what is rounded is smaller.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from xverse.kernels.weight import QuantizedWeight
from xverse.quant.gptq import HessianFactor
from xverse.quant.parity import rows_at_once

_TOKENS, _LARGE_TOKENS = 8192, 2048  # of calibration at most; for centres
_CLUSTERS, _ROWS = 64, 128  # of contexts at most; rows of each on average at least
_CENTRES, _CENTRE_ROWS = 64, 384  # the same of centres
_POINTS = 1 << 14  # from which centres are computed, at most
_ROUNDS = 8  # of k-means
_SHARE = 4.0  # times D: the tokens that the Hessian of all contexts counts for in each cluster's


def round_head(
    head: Tensor, rest: Tensor, inputs: Tensor, round_rows: Callable[..., QuantizedWeight]
) -> QuantizedWeight:
    """``rest`` [V, D], the ``head`` without its centres, by ``round_rows(rows, inputs=factor)``, for
    ``inputs`` [T, D]; all float32."""
    vocabulary, size = head.shape
    hessian = inputs.T @ inputs / len(inputs)
    inputs = _some(inputs, _TOKENS)
    parts = inputs.split(rows_at_once(vocabulary))
    contexts = torch.zeros_like(head)
    for x in parts:
        contexts.addmm_(_variances(head, x).T, x)
    count = max(1, min(_CLUSTERS, vocabulary // _ROWS))
    lengths = contexts.norm(dim=1).clamp(min=1e-30)
    _, cluster = _cluster(contexts / lengths[:, None], count, lengths.sqrt())
    members = one_hot(cluster, count).float()  # [V, C]
    likely = torch.cat([_variances(head, x) @ members for x in parts])  # [T, C]
    order, results = [], []
    for rows, weight in zip(members.T.bool(), likely.T, strict=True):
        if not rows.any():
            continue
        weight = weight.clamp(min=1e-20)  # no token of the calibration text makes these rows likely
        weight = weight / weight.max()
        local = (inputs * weight[:, None]).T @ inputs
        local *= hessian.trace() / local.trace()
        tokens = weight.sum().square() / weight.square().sum()  # the effective number
        share = _SHARE * size / (_SHARE * size + tokens)
        order.append(rows.nonzero().flatten())
        factor = HessianFactor(local.lerp(hessian, share))
        results.append(round_rows(rest[rows], inputs=factor))
    place = torch.cat(order).argsort()
    q, scales = (torch.cat(parts)[place] for parts in zip(*((r.q, r.scales) for r in results), strict=True))
    return QuantizedWeight(q, scales, results[0].bits, results[0].table)


def row_centres(head: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Centres float32 [C, D] of the rows of ``head`` [V, D] and the index of each row's nearest, int64 [V].
    Rows count by the root of their share of p (1 - p) after ``inputs`` float32 [T, D]."""
    head, inputs = head.float(), _some(inputs, _LARGE_TOKENS)
    mass = torch.full((len(head),), 1e-20, device=head.device)
    for x in inputs.split(rows_at_once(len(head))):
        mass += _variances(head, x).sum(dim=0)
    return _cluster(head, max(1, min(_CENTRES, len(head) // _CENTRE_ROWS)), mass.sqrt())


def _variances(head: Tensor, x: Tensor) -> Tensor:
    p = (x @ head.T).softmax(-1)
    return p * (1 - p)  # [t, V]


def _some(inputs: Tensor, most: int) -> Tensor:
    chosen = torch.linspace(0, len(inputs) - 1, min(len(inputs), most), device=inputs.device)
    return inputs[chosen.long()]


def _cluster(points: Tensor, count: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Centres [C, D] of ``points`` [V, D] and the index of the nearest one int64 [V], by k-means++ with
    ``weights`` float32 [V]."""
    generator = torch.Generator(device=points.device).manual_seed(0)
    weights, heaviest = weights.topk(min(_POINTS, len(points)))
    some = points[heaviest]
    centres = some[:1]
    far = torch.full_like(weights, torch.inf)  # squared distances from the nearest centre so far
    while len(centres) < count:
        far = torch.minimum(far, (some - centres[-1]).square().sum(dim=1))
        drawn = torch.multinomial((weights * far).clamp(min=1e-30), 1, generator=generator)
        centres = torch.cat((centres, some[drawn]))

    def nearest(points: Tensor) -> Tensor:
        half = centres.square().sum(dim=1) / 2
        return torch.cat([(part @ centres.T - half).argmax(1) for part in points.split(_POINTS)])

    for _ in range(_ROUNDS):
        cluster = nearest(some)
        total = torch.zeros_like(weights[:count]).index_add_(0, cluster, weights)
        sums = torch.zeros_like(centres).index_add_(0, cluster, some * weights[:, None])
        centres = torch.where(total[:, None] > 0, sums / total[:, None], centres)
    return centres, nearest(points)
