"""What can be checked of CUDA without a GPU: the layout that PyTorch's kernel receives."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from xverse.kernels import cuda
from xverse.kernels.tiles import tile, tile_shape
from xverse.quant.methods import rtn


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_rows_of_the_int4_kernel(group_size: int) -> None:
    weight = rtn(torch.randn(45, 256, generator=torch.Generator().manual_seed(0)), 4, group_size)
    rows, scales = cuda.int4_rows(tile(weight))
    assert rows.shape == (64, 128)
    values = torch.stack((rows >> 4, rows & 15), dim=2).view(64, 256).to(torch.int8) - 8
    assert torch.equal(values[:45], weight.q)
    assert torch.equal(scales[:45], weight.scales)
    assert not scales[45:].any()


@pytest.mark.parametrize("inputs", [96, 192, 256])
def test_shapes_that_pytorchs_operations_accept(inputs: int) -> None:
    with FakeTensorMode():  # tensors without data
        tiles = torch.empty(tile_shape(45, inputs, 4, 32), dtype=torch.uint8)
        x = torch.empty(2, 3, inputs, dtype=torch.bfloat16)
        result = cuda.quant_linear(x, tiles, 45, 4)
        assert (result.shape, result.dtype) == ((2, 3, 45), torch.bfloat16)
        weight, scales = cuda.int4_weight(tiles)
        assert weight.shape[0] * 8 == 64
        assert weight.shape[1] * weight.shape[3] * 32 == inputs
        assert scales.shape == (inputs // 32, 64, 2)
        tiles = torch.empty(tile_shape(45, inputs, 8, 32), dtype=torch.uint8)
        assert cuda.quant_linear(x, tiles, 45, 8).shape == (2, 3, 45)


def test_both_operations_have_a_cuda_implementation() -> None:
    for name in ("quant_linear", "quant_linears"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"xverse::{name}", "CUDA")
