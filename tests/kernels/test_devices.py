"""Every operation of ours runs on every device: no device lacks a kernel."""

from __future__ import annotations

import pytest
import torch

from xverse.kernels import ops
from xverse.kernels.paged_attention import PagedLayer
from xverse.kernels.tiles import tile
from xverse.model.rope import rotate
from xverse.quant.methods import rtn

NAMES = [
    *("quant_linear", "quant_linears", "dequantize", "linear_bf16", "rms_norm", "silu_mul", "rotate_"),
    *("paged_append", "paged_attention"),
]
DEVICES = ("CPU", "CUDA", "MPS", "XPU", "HPU", "PrivateUse1", "Meta")


def test_the_list_is_complete() -> None:
    known = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "xverse::" in name}
    assert known - {"packed_attention"} == set(NAMES)  # called behind ``kernels_fit`` only, on the CPU


@pytest.mark.parametrize("name", NAMES)
def test_no_device_lacks_a_kernel(name: str) -> None:
    for device in DEVICES:
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"xverse::{name}", device), device


@pytest.mark.parametrize("bits", [4, 8])
def test_fallbacks_compute_what_the_kernels_do(bits: int) -> None:
    """What runs where a device has no kernel of ours: the functions behind CompositeExplicitAutograd."""
    weight = rtn(torch.randn(45, 64), bits, 32)
    tiles, x = tile(weight), torch.randn(3, 64)
    assert torch.equal(ops.dequantize(tiles, 45, bits, torch.float32), weight.dequantize())
    expected = x @ weight.dequantize().T
    torch.testing.assert_close(ops.dequantized_linear(x, tiles, 45, bits), expected)
    torch.testing.assert_close(ops._plain_linears(x, [tiles] * 2, [45, 45], bits), [expected] * 2)
    q = torch.randn(2, 3, 4, 8)
    cos, sin = torch.randn(2, 1, 3, 8), torch.randn(2, 1, 3, 8)
    turned = rotate(q.transpose(1, 2), cos, sin).transpose(1, 2)
    ops.rotate_plainly(q, q.clone(), cos, sin)
    torch.testing.assert_close(q, turned)


def test_the_paged_operations_are_those_of_a_layer() -> None:
    pages = [torch.randn(4, 2, 32, 16) for _ in range(2)]
    layer = PagedLayer(*pages)
    k, v, q = (torch.randn(3, 2, 16) for _ in range(3))
    torch.ops.xverse.paged_append(k, v, *layer._pages(), torch.tensor([5, 33, 90]))
    assert torch.equal(pages[0][1, :, 1], k[1])
    assert torch.equal(pages[1][2, :, 26], v[2])
    table, lengths = torch.tensor([[3, 1], [0, 2], [1, 0]]).int(), torch.tensor([7, 64, 33]).int()
    found = torch.ops.xverse.paged_attention(q, *layer._pages(), table, lengths)
    torch.testing.assert_close(found, layer.attend(q, table, lengths))
