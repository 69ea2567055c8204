"""Packed attention: documents of one row see themselves alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from xverse.model.attention import Packed


@pytest.mark.parametrize("cuts", [[], [1], [5, 6, 40]])
def test_each_document_as_if_it_stood_alone(cuts: list[int]) -> None:
    length = 64
    generator = torch.Generator().manual_seed(len(cuts))
    q, k, v = (torch.randn(2, 3, length, 16, generator=generator) for _ in range(3))
    ids = torch.zeros(2, length, dtype=torch.int64)
    for cut in cuts:
        ids[1, cut:] += 1  # the first row is one document
    mixed = Packed(ids).attend(0, q, k, v)
    alone = scaled_dot_product_attention(q[:1], k[:1], v[:1], is_causal=True)
    torch.testing.assert_close(mixed[:1], alone, atol=1e-6, rtol=1e-6)
    for start, end in zip([0, *cuts], [*cuts, length], strict=True):
        part = (x[1:, :, start:end] for x in (q, k, v))
        alone = scaled_dot_product_attention(*part, is_causal=True)
        torch.testing.assert_close(mixed[1:, :, start:end], alone, atol=1e-6, rtol=1e-6)
