"""The Triton kernels in Triton's interpreter against PyTorch's operations. ``test_gpu_kernels.py`` runs this
file in a process of its own: the variable has to be set before Triton is imported."""

from __future__ import annotations

import pytest
import torch

from tests.scale import ALL
from xverse.kernels.gpu import attention, layers, linear
from xverse.kernels.paged_attention import PagedLayer
from xverse.kernels.tiles import tile
from xverse.model.rope import rotate
from xverse.quant.methods import rtn


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 128] if ALL else [32])
def test_weights_and_products(bits: int, group_size: int) -> None:
    outputs = 45
    generator = torch.Generator().manual_seed(bits)
    weight = rtn(torch.randn(outputs, 256, generator=generator), bits, group_size)
    tiles = tile(weight)
    assert torch.equal(linear.dequantize(tiles, outputs, bits, torch.float32), weight.dequantize())
    for tokens in (3, 5):
        # The interpreter's matrix product does not support bfloat16.
        x = torch.randn(tokens, 256, generator=generator).to(torch.bfloat16 if tokens < 5 else torch.float16)
        found = linear.product(x, tiles, outputs, bits, matrix_units=True)
        if tokens > linear.FEW_TOKENS and group_size == 32:
            assert found is None
            continue
        expected = x.double() @ weight.dequantize().double().T
        assert found.dtype == x.dtype
        assert (found.double() - expected).norm() <= 4e-3 * expected.norm(), tokens
        if tokens > linear.FEW_TOKENS:
            assert linear.product(x, tiles, outputs, bits, matrix_units=False) is None


def cache(kind: str, head_dim: int) -> PagedLayer:
    shape = (4, 2, 2, 2, 32)  # blocks, layers, keys and values, heads, positions
    if kind == "int8":
        data, scales = torch.zeros(*shape, head_dim, dtype=torch.int8), torch.zeros(shape)
        return PagedLayer(data[:, 1, 0], data[:, 1, 1], scales[:, 1, 0], scales[:, 1, 1])
    data = torch.full((*shape, head_dim), torch.nan)
    return PagedLayer(data[:, 1, 0], data[:, 1, 1])


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("head_dim", [32, 80] if ALL else [80])
def test_paged_cache(kind: str, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    ours, expected = cache(kind, head_dim), cache(kind, head_dim)
    k, v = (torch.randn(2, 70, head_dim, generator=generator).transpose(0, 1) for _ in range(2))
    slots = torch.randperm(3 * 32, generator=generator)[:70]
    attention.append(k, v, *ours._pages(), slots)
    expected._append_torch(k, v, slots)
    for found, wanted in zip(ours._pages(), expected._pages(), strict=True):
        if found is not None and wanted is not None:
            torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-6, atol=0)
    written = torch.zeros(3 * 32, dtype=torch.bool)
    written[slots] = True
    attention.append(k[:26], v[:26], *ours._pages(), (~written).nonzero().flatten())
    table = torch.stack([torch.randperm(3, generator=generator) for _ in range(3)]).int()
    lengths = torch.tensor([1, 33, 96], dtype=torch.int32)
    for heads in (2, 6):  # of the queries; six share the two of the cache
        q = torch.randn(3, heads, head_dim, generator=generator)
        found = attention.attend(q, *ours._pages(), table, lengths)
        torch.testing.assert_close(found, ours._attend_torch(q, table, lengths), rtol=1e-5, atol=1e-5)


def test_rows_that_are_not_finite_do_not_pass_for_numbers() -> None:
    ours, expected = cache("int8", 32), cache("int8", 32)
    k, v = torch.randn(4, 2, 32), torch.randn(4, 2, 32)
    k[0, 0, 3], k[1, 0, 0], k[2, 1] = torch.inf, torch.nan, 0.0
    for pages, append in ((ours, attention.append), (expected, None)):
        if append:
            append(k, v, *pages._pages(), torch.arange(4))
        else:
            pages._append_torch(k, v, torch.arange(4))
    for found, wanted in zip(ours._pages(), expected._pages(), strict=True):
        torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-6, atol=0)
    table = torch.zeros(1, 1, dtype=torch.int32)
    mixed = attention.attend(torch.randn(1, 2, 32), *ours._pages(), table, torch.tensor([4]).int())
    assert mixed.isnan().all(dim=-1).tolist() == [[True, False]]


def test_small_operations() -> None:
    x, weight = torch.randn(2, 3, 48), torch.randn(48)
    norm = torch.nn.functional.rms_norm(x, (48,), weight, 1e-6)
    torch.testing.assert_close(layers.rms_norm(x, weight, 1e-6), norm)
    gated = torch.nn.functional.silu(x) * (x + 1)
    torch.testing.assert_close(layers.silu_mul(x, x + 1), gated)
    for rows in (1, 2):
        q, k = torch.randn(2, 3, 2 * rows, 16), torch.randn(2, 3, 2, 16)
        cos, sin = torch.randn(rows, 1, 3, 16), torch.randn(rows, 1, 3, 16)
        wanted = [rotate(heads.transpose(1, 2), cos, sin).transpose(1, 2) for heads in (q, k)]
        layers.rotate_(q, k, cos, sin)
        torch.testing.assert_close([q, k], wanted)
