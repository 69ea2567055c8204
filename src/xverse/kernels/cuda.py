"""Products with quantised weights on CUDA, in PyTorch's own kernels.

INT4 with bfloat16 activations runs in ``_weight_int4pack_mm``, a product fused with dequantisation. Each
weight is converted to that kernel's layout on first use, and its tiles are kept. INT8 and other dtypes of
activations dequantise and multiply one part of the weight at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from xverse.kernels.ops import OPERATIONS, dequantized_linear
from xverse.kernels.tiles import TILE_ROWS, tile_group_size, untile

_packed = WeakTensorKeyDictionary()  # tiles → the kernel's weight, its scales and zeros


def quant_linear(x: Tensor, tiles: Tensor, outputs: int, bits: int) -> Tensor:
    """``x`` [..., K] times a weight in ``tiles`` → [..., outputs] of the same dtype; activations are not
    quantised."""
    if bits != 4 or x.dtype != torch.bfloat16:
        return dequantized_linear(x, tiles, outputs, bits)
    if tiles not in _packed:
        _packed[tiles] = int4_weight(tiles)
    weight, scales_and_zeros = _packed[tiles]
    flat = x.reshape(-1, x.shape[-1])  # [T, K]
    group_size = tile_group_size(tiles, bits)
    y = torch.ops.aten._weight_int4pack_mm(flat, weight, group_size, scales_and_zeros)
    return y[:, :outputs].reshape(*x.shape[:-1], outputs)


def quant_linears(x: Tensor, tiles: list[Tensor], outputs: list[int], bits: int) -> list[Tensor]:
    """``quant_linear`` of one input and several weights."""
    return [quant_linear(x, *weight, bits) for weight in zip(tiles, outputs, strict=True)]


def int4_weight(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel's weight, and its scales and zeros bfloat16 [K/g, N, 2], from 4-bit tiles; N is padded to a
    multiple of 32.

    The kernel computes ``(q - 8) · scale + zero`` with unsigned q, so the zeros are 0.
    """
    rows, scales = int4_rows(tiles)
    inputs = rows.shape[1] * 2
    inner = next(count for count in (8, 4, 2) if inputs % (16 * count) == 0)
    weight = torch.ops.aten._convert_weight_to_int4pack(rows, inner)
    return weight, torch.stack((scales.T, torch.zeros_like(scales.T)), dim=2).contiguous()  # [K/g, N, 2]


def int4_rows(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Unsigned values uint8 [N, K/2], the lower input in the upper nibble, and scales bfloat16 [N, K/g]."""
    weight = untile(tiles, len(tiles) * TILE_ROWS, 4)
    unsigned = (weight.q + 8).view(torch.uint8)
    return unsigned[:, 0::2] << 4 | unsigned[:, 1::2], weight.scales


OPERATIONS.impl("quant_linear", quant_linear, "CUDA")
OPERATIONS.impl("quant_linears", quant_linears, "CUDA")
