"""Rounding the head's rows by the contexts in which their tokens are likely.

To second order an error e of the logits costs half the variance of e under the predicted probabilities p: the
logit of a token matters where p (1 - p) is large. Rows of tokens that are likely in similar contexts are
rounded together, by the Hessian of the inputs with these weights. What is common to all rows changes no
probability; it is stored apart, so that what is rounded is smaller.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from xverse.kernels.weight import QuantizedWeight
from xverse.quant.gptq import HessianFactor
from xverse.quant.parity import rows_at_once

_TOKENS, _MEAN_TOKENS = 8192, 2048  # of calibration at most
_CLUSTERS, _ROWS = 64, 128  # at most; rows of each on average at least
_ROUNDS = 8  # of k-means
_SHARE = 4.0  # times D: the tokens that the Hessian of all contexts counts for in each cluster's


def round_head(head: Tensor, inputs: Tensor, round_rows: Callable[..., QuantizedWeight]) -> QuantizedWeight:
    """``head`` float32 [V, D] by ``round_rows(rows, inputs=factor)``, for ``inputs`` float32 [T, D]."""
    vocabulary, size = head.shape
    hessian = inputs.T @ inputs / len(inputs)
    inputs = _some(inputs, _TOKENS)
    parts = inputs.split(rows_at_once(vocabulary))

    def weights(x: Tensor) -> Tensor:
        p = (x @ head.T).softmax(-1)
        return p * (1 - p)  # [t, V]

    contexts = torch.zeros_like(head)
    for x in parts:
        contexts.addmm_(weights(x).T, x)
    count = max(1, min(_CLUSTERS, vocabulary // _ROWS))
    cluster = _cluster(contexts, count)
    members = one_hot(cluster, count).float()  # [V, C]
    likely = torch.cat([weights(x) @ members for x in parts])  # [T, C]
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
        results.append(round_rows(head[rows], inputs=factor))
    place = torch.cat(order).argsort()
    q, scales = (torch.cat(parts)[place] for parts in zip(*((r.q, r.scales) for r in results), strict=True))
    return QuantizedWeight(q, scales, results[0].bits, results[0].table)


def common_row(head: Tensor, inputs: Tensor) -> Tensor:
    """The mean [D] of the rows of ``head`` [V, D], float32, by the probabilities of their tokens after
    ``inputs`` float32 [T, D]."""
    head, inputs = head.float(), _some(inputs, _MEAN_TOKENS)
    likely = torch.zeros(len(head), device=head.device)
    for x in inputs.split(rows_at_once(len(head))):
        likely += (x @ head.T).softmax(-1).sum(dim=0)
    return likely @ head / len(inputs)


def _some(inputs: Tensor, most: int) -> Tensor:
    chosen = torch.linspace(0, len(inputs) - 1, min(len(inputs), most), device=inputs.device)
    return inputs[chosen.long()]


def _cluster(points: Tensor, count: int) -> Tensor:
    """The cluster int64 [V] of each of ``points`` [V, D], by k-means of their directions; the first centres
    are drawn from them by length."""
    lengths = points.norm(dim=1, keepdim=True).clamp(min=1e-30)
    generator = torch.Generator(device=points.device).manual_seed(0)
    drawn = torch.multinomial(lengths.flatten().sqrt(), count, generator=generator)
    points = points / lengths
    centres = points[drawn]
    for _ in range(_ROUNDS):
        nearest = (points @ centres.T).argmax(1)
        centres = normalize(torch.zeros_like(centres).index_add_(0, nearest, points))
    return nearest
