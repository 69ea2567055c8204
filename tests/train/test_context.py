"""What each process of a ring computes: every visible pair once, and equally much under a causal mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.scale import examples
from xverse.model import document_starts
from xverse.train.context import Ring, RingPacked, attention, attention_backward


def ring(rank: int, size: int) -> Ring:
    return Ring(None, rank, size)  # type: ignore[arg-type]


@given(st.integers(2, 4), st.integers(1, 6), st.floats(0, 0.6), st.integers(0, 2**32 - 1))
@settings(max_examples=examples(40), deadline=None)
def test_pieces_are_the_documents_causal_mask(size: int, chunk: int, cuts: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    length = 2 * size * chunk
    ids = (torch.rand(3, length, generator=generator) < cuts).cumsum(1).int()
    ids[0] = 0  # a row of one document
    index = torch.arange(length).expand(3, length)
    seen = torch.zeros(3, length, length, dtype=torch.int)
    for rank in range(size):
        context = RingPacked(ids, ring(rank, size))
        assert torch.equal(context.positions, ring(rank, size).columns(document_starts(ids)[1]))
        for source, pieces in enumerate(context._pieces):
            for piece in pieces:
                queries = ring(rank, size).columns(index)[piece.rows, piece.queries]  # [R, Q]
                keys = ring(source, size).columns(index)[piece.rows, piece.keys]  # [R, K]
                block = torch.ones(queries.shape[1], keys.shape[1], dtype=torch.int)
                for row, (q, k) in enumerate(zip(queries, keys, strict=True), piece.rows.start):
                    seen[row][q[:, None], k] += block.tril() if piece.causal else block
    assert torch.equal(seen, ((ids[:, :, None] == ids[:, None]).tril()).int())


@pytest.mark.parametrize("size", [2, 4, 8])
def test_one_document_is_equally_much_work_for_all(size: int) -> None:
    ids = torch.zeros(1, 16 * size, dtype=torch.int)

    def area(piece: Any) -> int:
        rows, columns = (part.stop - part.start for part in (piece.queries, piece.keys))
        return rows * (rows + 1) // 2 if piece.causal else rows * columns

    for step in range(size):
        work = {
            sum(area(p) for p in RingPacked(ids, ring(rank, size))._pieces[(rank - step) % size])
            for rank in range(size)
        }
        assert len(work) == 1, "no process waits for another at any step"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_parts_of_a_softmax_merge(dtype: torch.dtype) -> None:
    """Output and gradients from two halves of the keys, against the whole."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(2, 3, n, 16, dtype=dtype, requires_grad=True) for n in (5, 8, 8, 5))
    whole = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    expected = torch.autograd.grad(whole, (q, k, v), grad)
    halves = [(k[:, :, :3], v[:, :, :3]), (k[:, :, 3:], v[:, :, 3:])]
    sums = [attention(q, *half, False)[1] for half in halves]
    log_sum = torch.logaddexp(*sums)
    grads = [attention_backward(grad, q, *half, whole, log_sum, False) for half in halves]
    found = grads[0][0] + grads[1][0], *(torch.cat([g[i] for g in grads], dim=2) for i in (1, 2))
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def test_gpu_kernels_take_what_they_are_given() -> None:
    """Shapes and signatures alone: nothing is computed without a GPU."""
    for device, dtype in (("cuda", torch.bfloat16), ("meta", torch.float32)):
        with FakeTensorMode(allow_non_fake_inputs=True):
            q, k = (torch.empty(2, 4, n, 64, device=device, dtype=dtype) for n in (48, 80))
            out, log_sum = attention(q, k, k, False)
            assert (out.shape, log_sum.shape, log_sum.dtype) == (q.shape, (2, 4, 48), torch.float32)
            grads = attention_backward(out, q, k, k, out, log_sum, False)
            assert [grad.shape for grad in grads] == [q.shape, k.shape, k.shape]
