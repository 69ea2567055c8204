"""Packed attention: whole score matrices (short rows in training on a CPU) against the fused kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from xverse.model.attention import Packed, _dense_attention


def rows(batch: int, length: int, documents: int) -> tuple[Tensor, list[Tensor]]:
    """document_ids [B, T] with other cuts in each row, and normal q, k, v [B, H, T, 64]."""
    generator = torch.Generator().manual_seed(length)
    cuts = torch.randint(0, length, (batch, documents - 1), generator=generator).sort(dim=1).values
    ids = torch.searchsorted(cuts, torch.arange(length).expand(batch, length).contiguous(), right=True)
    return ids, [torch.randn(batch, 3, length, 64, generator=generator) for _ in range(3)]


def attend(ids: Tensor, qkv: list[Tensor], dtype: torch.dtype, dense: bool) -> list[Tensor]:
    """Output and the gradients of q, k and v, in float32."""
    context = Packed(ids)
    assert (context._bias is not None) == (ids.shape[1] <= 512)
    leaves = [x.to(dtype).requires_grad_() for x in qkv]
    if dense:  # called by itself: attend takes it in bfloat16 only
        mixed = _dense_attention(*leaves, context._bias.to(dtype))
    else:
        context._bias = None
        mixed = context.attend(0, *leaves)
    weights = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad((mixed.float() * weights).sum(), leaves)
    return [x.detach().float() for x in (mixed, *gradients)]


@pytest.mark.parametrize(("length", "documents"), [(1, 1), (7, 3), (64, 1), (130, 5), (512, 4)])
def test_dense_equals_fused_in_float32(length: int, documents: int) -> None:
    ids, qkv = rows(2, length, documents)
    dense = attend(ids, qkv, torch.float32, dense=True)
    fused = attend(ids, qkv, torch.float32, dense=False)
    for one, other in zip(dense, fused, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("length", "documents"), [(64, 1), (256, 4), (512, 2)])
def test_dense_in_bfloat16(length: int, documents: int) -> None:
    """Relative error (root mean square) against float32: at most 0.6 %, under twice the fused kernel's, where
    scores have a standard deviation of 1. The dense form rounds the scores as well, so larger scores cost
    more: at a deviation of 4, 1.5 %, which is what any attention with bfloat16 scores has."""
    ids, qkv = rows(2, length, documents)
    for scale, most in ((1, 0.006), (2, 0.015)):
        inputs = [(x * scale).bfloat16().float() for x in qkv]  # rounding them is no part of the error
        exact = attend(ids, inputs, torch.float32, dense=True)
        dense = attend(ids, inputs, torch.bfloat16, dense=True)
        fused = attend(ids, inputs, torch.bfloat16, dense=False)
        for true, one, other in zip(exact, dense, fused, strict=True):
            error, peer = ((x - true).norm() / true.norm() for x in (one, other))
            assert error < most
            if scale == 1:
                assert error < 2 * peer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attend_takes_the_dense_form_in_bfloat16_only(dtype: torch.dtype) -> None:
    ids, qkv = rows(2, 64, 3)
    qkv = [x.to(dtype) for x in qkv]
    dense = _dense_attention(*qkv, Packed(ids)._bias.to(dtype))
    context = Packed(ids)
    context._bias = None
    fused = context.attend(0, *qkv)
    assert not torch.equal(dense, fused), "the two round differently, which tells them apart"
    assert torch.equal(Packed(ids).attend(0, *qkv), dense if dtype == torch.bfloat16 else fused)


def test_dense_only_for_short_rows_in_training_on_a_cpu() -> None:
    short, long = torch.zeros(1, 512, dtype=torch.int64), torch.zeros(1, 513, dtype=torch.int64)
    assert Packed(short)._bias is not None
    assert Packed(long)._bias is None
    with torch.no_grad():
        assert Packed(short)._bias is None


def test_rows_beyond_the_dense_length_equal_each_document_alone() -> None:
    ids, qkv = rows(2, 600, 3)
    mixed = Packed(ids).attend(0, *qkv)
    for row in range(2):
        for number in ids[row].unique():
            chosen = ids[row] == number
            alone = scaled_dot_product_attention(*(x[row : row + 1, :, chosen] for x in qkv), is_causal=True)
            torch.testing.assert_close(mixed[row : row + 1, :, chosen], alone, atol=1e-5, rtol=1e-5)
