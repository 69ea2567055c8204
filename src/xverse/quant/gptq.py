"""GPTQ (Frantar et al., 2022): round column by column, and compensate each error in the remaining columns."""

from __future__ import annotations

import torch
from torch import Tensor

from xverse.kernels.weight import QuantizedWeight
from xverse.quant.methods import rtn

_BLOCK = 128  # columns whose errors are applied to the remaining columns in one product
_DAMPING = 0.01  # added to the Hessian's diagonal, as a share of its mean


class Hessian:
    """The mean of x xᵀ over the inputs ``x`` of a linear layer, by which its output error is measured."""

    def __init__(self, inputs: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._sum = torch.zeros(inputs, inputs, device=device)

    def add(self, x: Tensor) -> None:
        """Adds inputs [..., K]."""
        x = x.flatten(0, -2).float()
        self._sum.addmm_(x.T, x)
        self.tokens += len(x)

    @property
    def mean(self) -> Tensor:
        """Float32 [K, K]."""
        return self._sum / max(1, self.tokens)


class HessianFactor:
    """A Hessian, factorised once for all layers that share the input: the order of the columns, their
    importance and the Cholesky factor of the inverse."""

    def __init__(self, hessian: Tensor) -> None:
        """``hessian`` float32 [K, K]. Columns are rounded in order of importance, the largest diagonal first
        (activation order)."""
        assert hessian.isfinite().all(), "a Hessian that is not finite has no inverse"
        diagonal = hessian.diagonal()
        floor = 1e-6 * diagonal.mean().item()  # columns of inputs that are always 0 are rounded to nearest
        self.importance = diagonal.clamp(min=floor or 1.0)  # [K]
        self.order = diagonal.argsort(descending=True)  # [K]
        self.upper = _inverse_root(hessian[self.order][:, self.order])  # [K, K]


def gptq(weight: Tensor, bits: int, group_size: int, factor: HessianFactor) -> QuantizedWeight:
    """Round ``weight`` [N, K] so that its outputs change little for the inputs of the Hessian in ``factor``.

    The scales of the groups are computed first, by ``rtn`` weighted with the Hessian's diagonal. That leaves
    the order of the columns free, and the stored layout stays plain groups. Raises UserError as ``rtn`` does.
    """
    weight = weight.float()
    nearest = rtn(weight, bits, group_size, factor.importance)
    scales = nearest.scales.float().T.repeat_interleave(group_size, dim=0)[factor.order]  # [K, N]
    columns = weight.T[factor.order].contiguous()  # [K, N]: a column of the weight is a row here
    q = torch.empty(columns.shape, dtype=torch.int8, device=columns.device)
    q[factor.order] = _round_columns(columns, scales, factor.upper, bits)
    return QuantizedWeight(q.T.contiguous(), nearest.scales, bits)


def _inverse_root(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor [K, K] of the damped Hessian's inverse."""
    damping = _DAMPING
    mean = hessian.diagonal().mean().item() or 1.0
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 10  # not positive definite in float32


def _round_columns(columns: Tensor, scales: Tensor, upper: Tensor, bits: int) -> Tensor:
    """Integers int8 [K, N] for ``columns`` float32 [K, N], which are overwritten, and ``scales`` [K, N]."""
    half = 1 << (bits - 1)
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    q = torch.empty(columns.shape, dtype=torch.int8, device=columns.device)
    for start in range(0, len(columns), _BLOCK):
        end = min(start + _BLOCK, len(columns))
        errors = columns.new_empty(end - start, columns.shape[1])
        for i in range(start, end):
            rounded = (columns[i] * inverse[i]).clamp_(-half, half - 1).round_()
            q[i] = rounded.to(torch.int8)
            error = columns[i].addcmul(rounded, scales[i], value=-1).div_(upper[i, i])  # [N]
            columns[i + 1 : end].addr_(upper[i, i + 1 : end], error, alpha=-1)
            errors[i - start] = error
        columns[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return q
