"""The kernels' layout of a quantised weight: contiguous tiles of 32 outputs by one group of inputs.

A tile is 64 bytes of bfloat16 scales, then for every four inputs 16 outputs of four bytes each. With 8 bits
the other 16 outputs follow; with 4 bits they are the upper nibbles of the same bytes. Values are stored
unsigned, offset by 2^(bits-1). A weight is [ceil(N/32), K/group, 64 + 4 · bits · group] bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xverse.kernels.native import library
from xverse.kernels.weight import GROUP_SIZES, QuantizedWeight

TILE_ROWS = 32
SCALE_BYTES = 2 * TILE_ROWS
_ROWS_AT_ONCE = 8192  # for which PyTorch's operations hold copies of 4 bytes a weight


def tile_shape(outputs: int, inputs: int, bits: int, group_size: int) -> tuple[int, int, int]:
    """The shape of the tiles of a weight [outputs, inputs]."""
    return -(-outputs // TILE_ROWS), inputs // group_size, SCALE_BYTES + 4 * bits * group_size


def tile_group_size(tiles: Tensor, bits: int) -> int:
    """Inputs in a group of a weight in tiles."""
    return (tiles.shape[2] - SCALE_BYTES) // (4 * bits)


def kernel_group_size(group_size: int) -> int:
    """The largest group size of the kernels that divides ``group_size``; 0 if none does."""
    return max((size for size in GROUP_SIZES if group_size % size == 0), default=0)


def tile(weight: QuantizedWeight) -> Tensor:
    """The tiles uint8 of a weight. Groups larger than the kernels' are split, with their scale repeated."""
    group = kernel_group_size(weight.group_size)
    assert group, f"no kernel for groups of {weight.group_size}"
    weight = weight.regrouped(group)
    return tile_rows(to_rows(weight), weight.scales, weight.bits)


def to_rows(weight: QuantizedWeight) -> Tensor:
    """Unsigned values, uint8 [N, K · bits / 8], the lower input in the lower nibble."""
    if weight.bits == 8:
        return weight.q.view(torch.uint8) ^ 0x80
    unsigned = (weight.q + 8).view(torch.uint8)
    return unsigned[:, 0::2] | unsigned[:, 1::2] << 4


def from_rows(rows: Tensor, scales: Tensor, bits: int) -> QuantizedWeight:
    """The inverse of ``to_rows``, with ``scales`` bfloat16 [N, K/group]."""
    if bits == 8:
        return QuantizedWeight((rows ^ 0x80).view(torch.int8), scales, bits)
    nibbles = torch.stack((rows & 15, rows >> 4), dim=2).view(rows.shape[0], -1)  # [N, K]
    return QuantizedWeight(nibbles.view(torch.int8) - 8, scales, bits)


def tile_rows(rows: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Tiles from ``rows`` uint8 [N, K · bits / 8] and ``scales`` bfloat16 [N, K/group]."""
    outputs, groups = scales.shape
    inputs = rows.shape[1] * 8 // bits
    group = inputs // groups
    shape = tile_shape(outputs, inputs, bits, group)
    kernels = library()
    if kernels is not None and rows.device.type == "cpu":
        tiles = torch.empty(shape, dtype=torch.uint8)
        rows, scales = rows.contiguous(), scales.contiguous()
        kernels.xv_tile(
            rows.data_ptr(), scales.data_ptr(), tiles.data_ptr(), outputs, inputs, bits, group,
            torch.get_num_threads(),
        )  # fmt: skip
        return tiles
    if len(rows) > _ROWS_AT_ONCE:
        parts = zip(rows.split(_ROWS_AT_ONCE), scales.split(_ROWS_AT_ONCE), strict=True)
        return torch.cat([tile_rows(*part, bits) for part in parts])
    weight = from_rows(rows, scales, bits)
    missing = shape[0] * TILE_ROWS - outputs
    unsigned = torch.nn.functional.pad(weight.q.int() + (1 << (bits - 1)), (0, 0, 0, missing)).to(torch.uint8)
    four = unsigned.view(shape[0], 2, 16, groups, group // 4, 4)
    halves = four.permute(0, 3, 4, 1, 2, 5).reshape(shape[0], groups, group // 4, 2, 64)
    if bits == 4:
        halves = (halves[:, :, :, 0] | halves[:, :, :, 1] << 4).unsqueeze(3)
    padded = torch.nn.functional.pad(scales, (0, 0, 0, missing)).view(shape[0], TILE_ROWS, groups)
    scale_bytes = padded.transpose(1, 2).contiguous().view(torch.uint8)  # [N/32, G, 64]
    return torch.cat((scale_bytes, halves.reshape(shape[0], groups, -1)), dim=2).contiguous()


def untile(tiles: Tensor, outputs: int, bits: int) -> QuantizedWeight:
    """The weight [outputs, K] in ``tiles``, on their device."""
    count, groups, _ = tiles.shape
    group = tile_group_size(tiles, bits)
    scales = tiles[:, :, :SCALE_BYTES].contiguous().view(torch.bfloat16)  # [N/32, G, 32]
    scales = scales.transpose(1, 2).reshape(count * TILE_ROWS, groups)
    body = tiles[:, :, SCALE_BYTES:].reshape(count, groups, group // 4, -1, 16, 4)
    if bits == 4:
        body = torch.cat((body & 15, body >> 4), dim=3)  # [N/32, G, group/4, 2, 16, 4]
    values = body.permute(0, 3, 4, 1, 2, 5).reshape(count * TILE_ROWS, groups * group)
    q = (values.view(torch.int8) - 8) if bits == 4 else (values ^ 0x80).view(torch.int8)
    return QuantizedWeight(q[:outputs], scales[:outputs].contiguous(), bits)
