"""The kernels' layout of a quantised weight: contiguous tiles of 32 outputs by one group of inputs.

A tile is 64 bytes of bfloat16 scales, then for every four inputs (a step) 16 outputs of four bytes each. With
8 bits the other 16 outputs follow; with 4 bits they are the upper nibbles of the same bytes. Values are
stored unsigned, offset by 2^(bits-1). A weight is [ceil(N/32), K/group, 64 + 4 · bits · group] bytes.

Weights with a table, and all of 3 and 2 bits, are [ceil(N/32), 64 + K/group · (64 + 4 · bits · group)] bytes:
each row of tiles begins with the table's entries, repeated to 16. Steps of 4 bits are stored as without a
table. Two steps of 2 bits are the two nibbles of 64 bytes, the first 16 outputs in the low bits of each. Four
steps of 3 bits are three times 64 bytes: the lower three bits of the nibbles are the first three steps, their
fourth bits are the bits of the last step, the lowest in the first 64 bytes. Operations get the group of such
a weight as ``table_group``, which is 0 for all others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xverse.kernels.native import TABLE_FORMAT, call, library
from xverse.kernels.weight import GROUP_SIZES, QuantizedWeight

TILE_ROWS = 32
SCALE_BYTES = 2 * TILE_ROWS
TABLE_BYTES = 64
_ROWS_AT_ONCE = 8192  # for which PyTorch's operations hold copies of 4 bytes a weight


def tile_shape(outputs: int, inputs: int, bits: int, group_size: int, table: bool = False) -> tuple[int, ...]:
    """The shape of the tiles of a weight [outputs, inputs]; ``table``: it has one."""
    rows, groups, size = -(-outputs // TILE_ROWS), inputs // group_size, SCALE_BYTES + 4 * bits * group_size
    return (rows, TABLE_BYTES + groups * size) if table or bits < 4 else (rows, groups, size)


def tile_groups(tiles: Tensor, bits: int, table_group: int = 0) -> tuple[int, int]:
    """The number of groups of a weight in tiles, and the inputs in a group."""
    if table_group:
        return (tiles.shape[1] - TABLE_BYTES) // (SCALE_BYTES + 4 * bits * table_group), table_group
    return tiles.shape[1], (tiles.shape[2] - SCALE_BYTES) // (4 * bits)


def tile_format(bits: int, table_group: int) -> int:
    """The kernels' number of a format."""
    return bits + TABLE_FORMAT if table_group else bits


def kernel_group_size(group_size: int) -> int:
    """The largest group size of the kernels that divides ``group_size``; 0 if none does."""
    return max((size for size in GROUP_SIZES if group_size % size == 0), default=0)


def tile(weight: QuantizedWeight) -> Tensor:
    """The tiles uint8 of a weight. Groups larger than the kernels' are split, with their scale repeated."""
    group = kernel_group_size(weight.group_size)
    assert group, f"no kernel for groups of {weight.group_size}"
    weight = weight.regrouped(group)
    return tile_rows(to_rows(weight), weight.scales, weight.bits, weight.table)


def to_rows(weight: QuantizedWeight) -> Tensor:
    """Unsigned values, uint8 [N, K · bits / 8], the lower input in the lower bits; with 3 bits the lower two
    bits of all inputs come first, then the third bits."""
    if weight.bits == 8:
        return weight.q.view(torch.uint8) ^ 0x80
    return _pack((weight.q + (1 << (weight.bits - 1))).view(torch.uint8), weight.bits)


def _pack(unsigned: Tensor, bits: int) -> Tensor:
    if bits == 3:
        return torch.cat((_pack(unsigned & 3, 2), _pack(unsigned >> 2, 1)), dim=1)
    parts = unsigned.unflatten(1, (-1, 8 // bits)).unbind(2)
    packed = parts[0].clone()
    for number, part in enumerate(parts[1:], 1):
        packed |= part << (bits * number)
    return packed


def _unpack(rows: Tensor, bits: int) -> Tensor:
    """uint8 [N, K · bits / 8] → unsigned values [N, K]."""
    if bits == 3:
        low, high = rows.tensor_split([rows.shape[1] * 2 // 3], dim=1)
        return _unpack(low, 2) | _unpack(high, 1) << 2
    shifted = [rows >> shift & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.stack(shifted, dim=2).view(rows.shape[0], -1)


def from_rows(rows: Tensor, scales: Tensor, bits: int, table: Tensor | None = None) -> QuantizedWeight:
    """The inverse of ``to_rows``, with ``scales`` bfloat16 [N, K/group] and ``table`` int8 [2^bits]."""
    if bits == 8:
        return QuantizedWeight((rows ^ 0x80).view(torch.int8), scales, bits)
    return QuantizedWeight(_unpack(rows, bits).view(torch.int8) - (1 << (bits - 1)), scales, bits, table)


def _uniform_table(bits: int, device: torch.device) -> Tensor:
    half = 1 << (bits - 1)
    return torch.arange(-half, half, dtype=torch.int8, device=device)


def tile_rows(rows: Tensor, scales: Tensor, bits: int, table: Tensor | None = None) -> Tensor:
    """Tiles from ``rows`` uint8 [N, K · bits / 8], ``scales`` bfloat16 [N, K/group] and ``table`` int8
    [2^bits]."""
    outputs, groups = scales.shape
    inputs = rows.shape[1] * 8 // bits
    group = inputs // groups
    if bits < 4 and table is None:
        table = _uniform_table(bits, rows.device)
    shape = tile_shape(outputs, inputs, bits, group, table is not None)
    if library() is not None and rows.device.type == "cpu":
        tiles = torch.empty(shape, dtype=torch.uint8)
        entries = None if table is None else table.contiguous()
        form = tile_format(bits, 0 if table is None else group)
        call("xv_tile", rows.contiguous(), scales.contiguous(), entries, tiles, outputs, inputs, form, group)
        return tiles
    if len(rows) > _ROWS_AT_ONCE:
        parts = zip(rows.split(_ROWS_AT_ONCE), scales.split(_ROWS_AT_ONCE), strict=True)
        return torch.cat([tile_rows(*part, bits, table) for part in parts])
    unsigned = rows if bits == 8 else _unpack(rows, bits)
    missing = shape[0] * TILE_ROWS - outputs
    unsigned = torch.nn.functional.pad(unsigned, (0, 0, 0, missing), value=1 << (bits - 1))
    steps = unsigned.view(shape[0], 2, 16, groups, group // 4, 4)
    steps = steps.permute(0, 3, 4, 1, 2, 5).reshape(shape[0], groups, group // 4, 2, 64)
    padded = torch.nn.functional.pad(scales, (0, 0, 0, missing)).view(shape[0], TILE_ROWS, groups)
    scale_bytes = padded.transpose(1, 2).contiguous().view(torch.uint8)  # [N/32, G, 64]
    tiles = torch.cat((scale_bytes, _pack_steps(steps, bits)), dim=2).contiguous()
    if table is None:
        return tiles
    head = torch.zeros(shape[0], TABLE_BYTES, dtype=torch.uint8, device=rows.device)
    head[:, :16] = table.view(torch.uint8).repeat(16 >> bits)
    return torch.cat((head, tiles.flatten(1)), dim=1)


def _pack_steps(steps: Tensor, bits: int) -> Tensor:
    """Steps uint8 [N/32, G, group/4, 2, 64], halves of the outputs apart → [N/32, G, 4 · bits · group]."""
    if bits == 8:
        return steps.flatten(2)
    low, high = steps.unbind(3)
    if bits == 4:
        return (low | high << 4).flatten(2)
    if bits == 2:
        both = low | high << 2
        return (both[:, :, ::2] | both[:, :, 1::2] << 4).flatten(2)
    nibbles = (low | high << 4).unflatten(2, (-1, 4))  # [N/32, G, group/16, 4, 64]
    last = nibbles[:, :, :, 3]
    bits_of_last = [last << 3 & 0x88, last << 2 & 0x88, last << 1 & 0x88]
    return (nibbles[:, :, :, :3] | torch.stack(bits_of_last, dim=3)).flatten(2)


def _unpack_steps(body: Tensor, bits: int) -> Tensor:
    """The inverse of ``_pack_steps``."""
    lines = body.unflatten(2, (-1, 64))  # [N/32, G, lines, 64]
    if bits == 8:
        return lines.unflatten(2, (-1, 2))
    if bits == 2:
        lines = torch.stack((lines & 15, lines >> 4), dim=3).flatten(2, 3)
        return torch.stack((lines & 3, lines >> 2), dim=3)
    if bits == 3:
        three = lines.unflatten(2, (-1, 3))
        a, b, c = (three & 0x88).unbind(3)
        lines = torch.cat((three & 0x77, (a >> 3 | b >> 2 | c >> 1).unsqueeze(3)), dim=3).flatten(2, 3)
    return torch.stack((lines & 15, lines >> 4), dim=3)


def untile(tiles: Tensor, outputs: int, bits: int, table_group: int = 0) -> QuantizedWeight:
    """The weight [outputs, K] in ``tiles``, on their device."""
    count = len(tiles)
    groups, group = tile_groups(tiles, bits, table_group)
    table = None
    if table_group:
        table = tiles[0, : 1 << bits].clone().view(torch.int8)
        if bits < 4 and torch.equal(table, _uniform_table(bits, tiles.device)):
            table = None
        tiles = tiles[:, TABLE_BYTES:].unflatten(1, (groups, -1))
    scales = tiles[:, :, :SCALE_BYTES].contiguous().view(torch.bfloat16)  # [N/32, G, 32]
    scales = scales.transpose(1, 2).reshape(count * TILE_ROWS, groups)[:outputs].contiguous()
    steps = _unpack_steps(tiles[:, :, SCALE_BYTES:], bits)  # [N/32, G, group/4, 2, 64]
    steps = steps.reshape(count, groups, group // 4, 2, 16, 4)
    values = steps.permute(0, 3, 4, 1, 2, 5).reshape(count * TILE_ROWS, groups * group)[:outputs]
    q = (values ^ 0x80).view(torch.int8) if bits == 8 else values.view(torch.int8) - (1 << (bits - 1))
    return QuantizedWeight(q, scales, bits, table)
