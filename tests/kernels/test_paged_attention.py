"""Attention over a paged cache compared with float64, over odd shapes, for every instruction set of this
machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from xverse.kernels import paged_attention
from xverse.kernels.native import NAMES, kernel_name, library
from xverse.kernels.paged_attention import PagedLayer, quantize_rows

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}  # of a result in this type
TYPES = [
    pytest.param(cache, query, id=f"{cache}-{query}".replace("torch.", ""))
    for cache, query in (
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.int8, torch.float32),
        (torch.int8, torch.bfloat16),
    )
]


@pytest.fixture(params=[*NAMES, "none"])
def paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test with one instruction set after the other, and with PyTorch's operations."""
    if request.param == "none":
        monkeypatch.setattr(paged_attention, "library", lambda: None)
        yield request.param
        return
    kernels = library()
    if kernels is None:
        pytest.skip("the kernels were not compiled")
    if kernels.xv_select(request.param.encode()) is None:
        pytest.skip(f"this processor does not have {request.param}")
    yield request.param
    kernels.xv_select(kernel_name().encode())


def empty_cache(
    blocks: int, heads: int, block_size: int, head_dim: int, dtype: torch.dtype, layer: int = 1
) -> PagedLayer:
    """One of several layers in one tensor; unwritten positions hold NaN or 127."""
    shape = (blocks, 3, 2, heads, block_size)
    scales = torch.full(shape, torch.nan) if dtype == torch.int8 else None
    data = torch.full((*shape, head_dim), 127 if dtype == torch.int8 else torch.nan, dtype=dtype)
    return PagedLayer(
        data[:, layer, 0],
        data[:, layer, 1],
        None if scales is None else scales[:, layer, 0],
        None if scales is None else scales[:, layer, 1],
    )


class Filled:
    """Sequences of ``lengths`` in a cache whose blocks are shuffled, and their keys and values [L, H, D]."""

    def __init__(
        self, lengths: list[int], heads: int, block_size: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(sum(lengths) + head_dim)
        needed = [-(-length // block_size) for length in lengths]
        order = torch.randperm(sum(needed), generator=generator, dtype=torch.int32)
        self.cache = empty_cache(sum(needed), heads, block_size, head_dim, dtype)
        self.table = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.k, self.v = [], []
        for row, blocks in enumerate(order.split(needed)):
            self.table[row, : len(blocks)] = blocks
            shape = (lengths[row], heads, head_dim)
            k, v = torch.randn(shape, generator=generator) * 2, torch.randn(shape, generator=generator)
            at = torch.arange(lengths[row])
            slots = blocks[at // block_size].long() * block_size + at % block_size
            if dtype == torch.bfloat16:
                k, v = k.bfloat16(), v.bfloat16()
            self.cache.append(k, v, slots)
            self.k.append(k)
            self.v.append(v)

    def stored(self, row: int) -> tuple[Tensor, Tensor]:
        """What the cache holds of a sequence, [H, L, D] in float64."""
        return self.cache.gather(self.table[row], int(self.lengths[row]), torch.float64)


def exact(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query [H, D] over keys and values [H, L, D], in float64."""
    scores = (keys @ q.double()[:, :, None])[:, :, 0] * q.shape[-1] ** -0.5  # [H, L]
    return (scores.softmax(-1)[:, None] @ values)[:, 0]


def error_of(result: Tensor, expected: Tensor) -> float:
    """The largest error of a head's output, relative to its norm."""
    return float(((result.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@pytest.mark.parametrize(("stored", "dtype"), TYPES)
@pytest.mark.parametrize(
    ("block_size", "head_dim"),
    [(16, 16), (64, 32), (16, 64), (32, 64), (32, 96), (32, 128), (64, 128), (16, 160)],
)
def test_decode(paths: str, block_size: int, head_dim: int, stored: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batches = ([1], [block_size - 1, 1, block_size + 1], [block_size, 700, 2, 3 * block_size, 129])
    for lengths in batches:
        filled = Filled(lengths, 3, block_size, head_dim, stored)
        q = (
            torch.randn(3, len(lengths), head_dim).to(dtype).transpose(0, 1)
        )  # strides that are not contiguous
        result = filled.cache.attend(q, filled.table, filled.lengths)
        assert result.dtype == dtype
        expected = torch.stack([exact(q[row], *filled.stored(row)) for row in range(len(lengths))])
        bound = max(ROUNDING[dtype], 3e-4 if stored == torch.int8 else 0)  # there a query has 16 bits
        if paths == "none" or head_dim == 16:
            bound *= 4  # PyTorch's attention receives keys and values in the query's dtype
        assert error_of(result, expected) < bound


@pytest.mark.parametrize(("stored", "dtype"), TYPES)
def test_a_rows_bits_depend_on_that_row_alone(paths: str, stored: torch.dtype, dtype: torch.dtype) -> None:
    """For any number of queries, of the same sequence or of others, and any number of threads."""
    if paths == "none":
        pytest.skip("PyTorch's attention does not guarantee this")
    filled = Filled([1300, 40, 700], 8, 32, 64, stored)
    lengths = torch.tensor([1295, 1296, 1297, 40, 699, 700, 64, 65], dtype=torch.int32)
    table = filled.table[[0, 0, 0, 1, 2, 2, 2, 2]]
    q = torch.randn(len(lengths), 8, 64).to(dtype)
    alone = torch.cat(
        [filled.cache.attend(q[i : i + 1], table[i : i + 1], lengths[i : i + 1]) for i in range(len(q))]
    )
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(filled.cache.attend(q, table, lengths), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160])
def test_prefill(paths: str, head_dim: int, stored: torch.dtype) -> None:
    for block_size, tokens, start in ((16, 1, 0), (32, 1, 40), (16, 7, 30), (32, 50, 0), (64, 100, 33)):
        filled = Filled([start + tokens], 2, block_size, head_dim, stored)
        q = torch.randn(2, tokens, head_dim).bfloat16().transpose(0, 1)
        result = filled.cache.prefill(q, filled.table[0], start)
        keys, values = filled.stored(0)
        expected = torch.stack(
            [exact(q[t], keys[:, : start + t + 1], values[:, : start + t + 1]) for t in range(tokens)]
        )
        assert error_of(result, expected) < 4 * ROUNDING[torch.bfloat16]  # weights are bfloat16 too


@pytest.mark.parametrize("start", [0, 37])
def test_prefill_in_float32(start: int) -> None:
    filled = Filled([start + 20], 2, 16, 64, torch.float32)
    q = torch.randn(20, 2, 64)
    keys, values = filled.stored(0)
    expected = torch.stack(
        [exact(q[t], keys[:, : start + t + 1], values[:, : start + t + 1]) for t in range(20)]
    )
    assert error_of(filled.cache.prefill(q, filled.table[0], start), expected) < ROUNDING[torch.float32]


def test_decode_equals_attention_over_contiguous_tensors(paths: str) -> None:
    filled = Filled([77], 4, 32, 64, torch.float32)
    q = torch.randn(1, 4, 64)
    keys, values = filled.k[0].transpose(0, 1)[None], filled.v[0].transpose(0, 1)[None]  # [1, H, L, D]
    expected = scaled_dot_product_attention(q[:, :, None], keys, values)[:, :, 0]
    torch.testing.assert_close(filled.cache.attend(q, filled.table, filled.lengths), expected)


def test_threads_share_a_long_context(paths: str) -> None:
    filled = Filled([3000, 5], 2, 32, 128, torch.bfloat16)
    q = torch.randn(2, 2, 128).bfloat16()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            result = filled.cache.attend(q, filled.table, filled.lengths)
            expected = torch.stack([exact(q[row], *filled.stored(row)) for row in range(2)])
            assert error_of(result, expected) < ROUNDING[torch.bfloat16]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("what", ["keys", "values"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_affect_their_own_sequence_and_head_alone(
    paths: str, stored: torch.dtype, what: str, value: float
) -> None:
    filled = Filled([70, 60, 90], 2, 32, 64, stored)
    dtype = torch.float32 if stored == torch.float32 else torch.bfloat16
    q = torch.randn(3, 2, 64).to(dtype)
    clean = filled.cache.attend(q, filled.table, filled.lengths)
    k, v = filled.k[1][40:41].clone(), filled.v[1][40:41].clone()
    (k if what == "keys" else v)[0, 1, 5] = value
    filled.cache.append(k, v, filled.table[1, 1:2].long() * 32 + 8)
    result = filled.cache.attend(q, filled.table, filled.lengths)
    assert torch.equal(result[[0, 2]], clean[[0, 2]])
    assert torch.equal(result[1, 0], clean[1, 0])
    if what == "values" or stored == torch.int8 or value != value:
        assert not result[1, 1].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_query_gives_no_finite_result(paths: str, value: float) -> None:
    for stored in (torch.float32, torch.bfloat16, torch.int8):
        filled = Filled([40, 40], 2, 32, 64, stored)
        q = torch.randn(2, 2, 64).bfloat16()
        clean = filled.cache.attend(q, filled.table, filled.lengths)
        q[0, 0, 3] = value
        result = filled.cache.attend(q, filled.table, filled.lengths)
        assert not result[0, 0].isfinite().any()
        assert torch.equal(result[1], clean[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_rows_are_within_half_a_step(paths: str, dtype: torch.dtype) -> None:
    cache = empty_cache(3, 4, 16, 64, torch.int8)
    k, v = torch.randn(2, 4, 9, 64).to(dtype).transpose(1, 2)  # [9, H, D], heads apart
    k[2] *= 1e-30
    k[3] = 0
    v[4, 2, 7] = 1e4
    slots = torch.randperm(48)[:9]
    cache.append(k, v, slots)
    for rows, pages, scales in ((k, cache.keys, cache.key_scales), (v, cache.values, cache.value_scales)):
        assert scales is not None
        at = (slots // 16, slice(None), slots % 16)
        step = rows.float().abs().amax(-1) / 127
        torch.testing.assert_close(scales[at], step)
        error = (pages[at].float() * scales[at][..., None] - rows.float()).abs()
        assert (error <= 0.501 * step[..., None]).all()
        assert torch.equal(pages[at], quantize_rows(rows)[0]) or paths != "none"
    untouched = torch.ones(48, dtype=torch.bool)
    untouched[slots] = False
    assert (cache.keys.transpose(1, 2).flatten(0, 1)[untouched] == 127).all()
