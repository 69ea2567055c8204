"""The head: rows rounded by the contexts in which their tokens are likely."""

from __future__ import annotations

import torch
from torch import Tensor

from xverse.kernels.weight import QuantizedWeight, table_of
from xverse.quant.gptq import HessianFactor, gptq
from xverse.quant.head import round_head, row_centres

FORM = (4, 32)


def _languages(tokens: int) -> tuple[Tensor, Tensor]:
    """A head [512, 64] and inputs [T, 64] of two kinds, each of which makes its own half of tokens likely."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.tensor([1.0, -1.0])
    kind = torch.arange(tokens) % 2
    x = torch.randn(tokens, 64, generator=generator)
    for index in range(2):  # the kinds use different directions
        mixing = torch.randn(64, 64, generator=generator) * torch.logspace(0, -2, 64)[:, None]
        x[kind == index] = x[kind == index] @ mixing
    x[:, 0] = 6 * signs[kind]
    head = torch.randn(512, 64, generator=generator) * 0.1
    head[:, 0] = signs[torch.arange(512) % 2]
    return head, x


def test_likely_tokens_lose_less_than_with_one_hessian() -> None:
    head, x = _languages(2000)
    hessian = x.T @ x / len(x)

    def round_rows(rows: Tensor, inputs: HessianFactor) -> QuantizedWeight:
        return gptq(rows, *FORM, inputs, table_of(4))

    p = (x @ head.T).softmax(-1)

    def loss(weight: Tensor) -> float:
        error = x @ (weight - head).T
        return ((p * error.square()).sum(1) - (p * error).sum(1).square()).mean().item()

    by_context = round_head(head, head, x, round_rows)
    plain = gptq(head, *FORM, HessianFactor(hessian), table_of(4))
    assert by_context.q.shape == plain.q.shape
    assert by_context.scales.shape == plain.scales.shape
    assert (by_context.dequantize() - head).norm() < 0.2 * head.norm()  # every row at its place
    assert loss(by_context.dequantize()) < 0.95 * loss(plain.dequantize())
    assert torch.equal(by_context.q, round_head(head, head, x, round_rows).q)


def test_centres_take_what_rows_have_in_common() -> None:
    generator = torch.Generator().manual_seed(3)
    head, x = torch.randn(1600, 64, generator=generator) * 0.1, torch.randn(500, 64, generator=generator)
    kind = torch.arange(1600) % 4
    head += torch.randn(4, 64, generator=generator)[kind]
    centres, nearest = row_centres(head, x)
    assert centres.shape == (1600 // 384, 64)
    assert len(set(zip(kind.tolist(), nearest.tolist(), strict=True))) == 4  # the kinds themselves
    assert (head - centres[nearest]).square().sum() < 0.02 * head.square().sum()
    few, all_zero = row_centres(head[:5], x)
    assert few.shape == (1, 64)
    assert not all_zero.any()


def test_few_tokens_and_unlikely_rows() -> None:
    head, x = _languages(3)
    head[5] = 0.0
    head[8:200] = -100 * x.sum(0)  # never likely
    result = round_head(head, head, x, lambda rows, inputs: gptq(rows, *FORM, inputs))
    assert result.scales.isfinite().all()
    assert result.dequantize()[5].count_nonzero() == 0
