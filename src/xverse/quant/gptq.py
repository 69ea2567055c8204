"""Rounding with error feedback: GPTQ (Frantar et al., 2022) in the form of LDLQ (Chee et al., 2023).

With H = U D Uᵀ (U unit upper triangular) the output error of a weight whose rounding errors are E is the sum
over columns k of D_k (E_k + sum over j < k of E_j U_jk)². Columns are rounded in order; each is first moved
by the errors of those before it, times U, so that only its own rounding error remains. That equals GPTQ, but
needs the Cholesky factor of the Hessian alone, not that of its inverse: a quarter of the work.

The covariance of the loss's gradients by the outputs is a second Hessian G. With trace(G E H Eᵀ) in place of
trace(E H Eᵀ) (YAQA: Tseng et al., 2025) each row takes errors of the rows before it, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xverse.kernels.native import call, library
from xverse.kernels.weight import QuantizedWeight
from xverse.quant.methods import Levels, rtn

_BLOCK = 128  # columns that are rounded between two matrix products
_DAMPING = 0.01  # added to the Hessian's diagonal, as a share of its mean
_ROWS, _ROW_DAMPING = 16, 0.1  # rows that take no errors of each other; of the gradients' covariance
_PARTS = 4  # of a Hessian's columns: only blocks on and above the diagonal are computed


class Hessian:
    """The mean of x xᵀ over the inputs ``x`` of a linear layer, by which its output error is measured."""

    def __init__(self, inputs: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._sum = torch.zeros(inputs, inputs, device=device)
        self._step = -(-inputs // _PARTS)

    def add(self, x: Tensor) -> None:
        """Adds inputs [..., K]."""
        x = x.flatten(0, -2).float()
        for start in range(0, x.shape[1], self._step):
            part = slice(start, start + self._step)
            self._sum[part, start:].addmm_(x[:, part].T, x[:, start:])
        self.tokens += len(x)

    @property
    def mean(self) -> Tensor:
        """Float32 [K, K]."""
        upper = self._sum.triu()
        return (upper + upper.triu(1).T).div_(max(1, self.tokens))


class HessianFactor:
    """A Hessian, factorised once for all layers that share the input.

    ``order`` int64 [K]: columns by importance, the largest diagonal first (activation order); ``feedback``
    [K, K], in that order: ``feedback[j, k]`` is the share of the error of column j that column k > j takes;
    ``importance`` [K], in the weight's order: the output error per squared rounding error of a column.
    """

    def __init__(self, hessian: Tensor) -> None:
        """``hessian`` float32 [K, K]."""
        assert hessian.isfinite().all(), "a Hessian that is not finite cannot be factorised"
        self.order = hessian.diagonal().argsort(descending=True)
        root = _upper_root(hessian[self.order][:, self.order])  # [K, K]
        diagonal = root.diagonal().clone()
        self.feedback = root.div_(diagonal)
        self.importance = torch.empty_like(diagonal)
        self.importance[self.order] = diagonal.square()


def gptq(
    weight: Tensor,
    bits: int,
    group_size: int,
    factor: HessianFactor,
    table: Tensor | None = None,
    gradients: Tensor | None = None,
) -> QuantizedWeight:
    """Round ``weight`` [N, K] so that its outputs change little for the inputs of the Hessian in ``factor``.

    The scales of the groups are computed first, by ``rtn`` weighted with the factor's importance: the error
    that feedback leaves. That leaves the order of the columns free, and the stored layout stays plain groups.
    ``gradients`` float32 [N, N]: the covariance of the loss's gradients by the outputs, for feedback between
    rows. Raises UserError as ``rtn`` does.
    """
    weight = weight.float()
    first = rtn(weight, bits, group_size, factor.importance, table)
    columns, scales, group_of = weight[:, factor.order], first.scales.float(), factor.order // group_size
    levels = Levels(bits, first.table)
    if gradients is None:
        rounded = round_columns(columns, scales, group_of, factor.feedback, levels)
    else:
        rounded = _round_rows(columns, scales, group_of, factor.feedback, levels, gradients)
    q = torch.empty_like(rounded)
    q[:, factor.order] = rounded
    return QuantizedWeight(q, first.scales, bits, first.table)


def _round_rows(
    weight: Tensor, scales: Tensor, group_of: Tensor, feedback: Tensor, levels: Levels, gradients: Tensor
) -> Tensor:
    """``round_columns`` for some rows after the other, by importance: each is first moved by the errors of
    those before it."""
    order = gradients.diagonal().argsort(descending=True)
    root = _upper_root(gradients[order][:, order], _ROW_DAMPING)  # [N, N]
    q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    errors = torch.empty_like(weight)  # in the order of rounding
    for start in range(0, len(weight), _ROWS):
        block = slice(start, min(start + _ROWS, len(weight)))
        rows = order[block]
        share = torch.linalg.solve_triangular(root[block, block], root[:start, block], upper=True, left=False)
        q[rows] = round_columns(
            weight[rows] + share.T @ errors[:start], scales[rows], group_of, feedback, levels
        )
        errors[block] = weight[rows] - levels.of(q[rows]) * scales[rows][:, group_of]
    return q


def round_columns(
    weight: Tensor, scales: Tensor, group_of: Tensor, feedback: Tensor, levels: Levels
) -> Tensor:
    """Integers int8 [N, K] for ``weight`` float32 [N, K], whose columns are rounded from first to last.

    ``scales`` float32 [N, G]; ``group_of`` int64 [K]: the group of each column; ``feedback`` [K, K] as in
    ``HessianFactor``. The compiled code and PyTorch's differ by the rounding of sums only.
    """
    columns = weight.shape[1]
    q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    errors = torch.empty_like(weight)
    for start in range(0, columns, _BLOCK):
        block = slice(start, min(start + _BLOCK, columns))
        shift = errors[:, :start] @ feedback[:start, block]  # [N, block]
        views = weight[:, block], q[:, block], errors[:, block]
        _round_block(*views, shift, scales, group_of[block], feedback[block, block], levels)
    return q


def _upper_root(hessian: Tensor, damping: float = _DAMPING) -> Tensor:
    """R upper triangular [K, K] with R Rᵀ the Hessian, damped by a share of its mean."""
    mean = hessian.diagonal().mean().item() or 1.0
    while True:
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return lower.flip(0, 1)
        damping *= 10  # not positive definite in float32


def _round_block(
    weight: Tensor,
    q: Tensor,
    errors: Tensor,
    shift: Tensor,
    scales: Tensor,
    group_of: Tensor,
    feedback: Tensor,
    levels: Levels,
) -> None:
    """Writes ``q`` and ``errors`` [N, block], which are views like ``weight``; overwrites ``shift``."""
    count = weight.shape[1]
    if library() is not None and weight.device.type == "cpu":
        call(
            "xv_round_columns", weight, shift, feedback.contiguous(), scales, group_of.int(), q, errors,
            len(weight), weight.stride(0), scales.shape[1], count, levels.bits, levels.table,
        )  # fmt: skip
        return
    for k in range(count):
        scale = scales[:, group_of[k]]
        inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
        moved = (weight[:, k] + shift[:, k]) * inverse
        q[:, k] = levels.index(moved)
        errors[:, k] = weight[:, k] - levels.value(moved) * scale
        shift[:, k + 1 :].addr_(errors[:, k], feedback[k, k + 1 :])
