"""The paged cache: keys and values of all requests in blocks, and the attention context over them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from xverse.config import UserError
from xverse.kernels.ops import advise_huge_pages
from xverse.kernels.paged_attention import PAGE, PagedLayer
from xverse.model.config import XverseConfig

BLOCK_SIZE = PAGE  # unless a cache has larger ones
KV_DTYPES = ("auto", "int8")


class BlockPool:
    """Reference counts of ``count`` blocks. Blocks are reused last-freed-first: their pages are resident."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count

    @property
    def free(self) -> int:
        """The number of blocks without a holder."""
        return len(self._free)

    def take(self) -> int:
        """Allocate a block with one holder. Raises IndexError if none is free."""
        block = self._free.pop()
        self._holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a holder to an allocated block."""
        assert self._holders[block] > 0, f"block {block} is free"
        self._holders[block] += 1

    def holders(self, block: int) -> int:
        """The number of holders."""
        return self._holders[block]

    def release(self, block: int) -> None:
        """Remove a holder; without any the block is free."""
        assert self._holders[block] > 0, f"block {block} is free"
        self._holders[block] -= 1
        if not self._holders[block]:
            self._free.append(block)


class PagedCache:
    """Memory for ``blocks`` blocks of ``block_size`` positions: [blocks, layers, 2, KV, block_size,
    head_dim].

    ``kv_dtype`` "auto" stores in ``dtype``, "int8" with a float32 scale per position and head. At most
    ``sequences`` sequences use it at once. On a CPU pages become resident when first written; other devices
    allocate them at once. Raises UserError for an unknown ``kv_dtype`` or if there is not enough memory.
    """

    def __init__(
        self,
        config: XverseConfig,
        dtype: torch.dtype,
        device: torch.device,
        *,
        blocks: int,
        sequences: int,
        kv_dtype: str = "auto",
        block_size: int = BLOCK_SIZE,
    ) -> None:
        if kv_dtype not in KV_DTYPES:
            raise UserError(f"kv_dtype: '{kv_dtype}' is not one of {', '.join(KV_DTYPES)}")
        self.device, self.block_size = device, block_size
        shape = (blocks + 1, config.num_hidden_layers, 2, config.num_key_value_heads, block_size)
        stored = torch.int8 if kv_dtype == "int8" else dtype
        try:
            data = torch.empty(*shape, config.head_dim, dtype=stored, device=device)
            scales = torch.empty(shape, device=device) if kv_dtype == "int8" else None
        except RuntimeError as error:
            size = blocks * position_bytes(config, dtype, kv_dtype) * block_size / 1e9
            raise UserError(
                f"max_cache_tokens: not enough memory for {blocks * block_size} tokens ({size:.1f} GB)"
            ) from error
        scaling = config.rope_scaling
        self.rope_depends_on_length = scaling is not None and scaling.rope_type == "dynamic"
        self.pool = BlockPool(blocks)
        self.scratch = blocks  # a block that is never read
        # The blocks of each sequence in order. Unused entries are 0; kernels read no further than the
        # positions of a sequence.
        width = -(-config.context_length // block_size)
        self.tables = torch.zeros(sequences, width, dtype=torch.int32, device=device)
        self.free_rows = list(range(sequences - 1, -1, -1))
        advise_huge_pages(data)
        self._data = [data] if scales is None else [data, scales]
        self.layers = [
            PagedLayer(
                data[:, layer, 0],
                data[:, layer, 1],
                None if scales is None else scales[:, layer, 0],
                None if scales is None else scales[:, layer, 1],
            )
            for layer in range(config.num_hidden_layers)
        ]

    def copy(self, source: int, target: int) -> None:
        """Copy a block."""
        for data in self._data:
            data[target].copy_(data[source])


def position_bytes(config: XverseConfig, dtype: torch.dtype, kv_dtype: str = "auto") -> int:
    """Bytes of one position of one request in all layers."""
    vector = config.head_dim + 4 if kv_dtype == "int8" else config.head_dim * dtype.itemsize
    return 2 * config.num_hidden_layers * config.num_key_value_heads * vector


class SequenceCache:
    """One request's blocks in order. ``length`` positions are written, of at most ``longest``."""

    def __init__(self, cache: PagedCache, longest: int) -> None:
        self.cache = cache
        self.longest = longest
        self.length = 0
        self.blocks: list[int] = []
        self.row = cache.free_rows.pop()

    def missing(self, length: int) -> int:
        """How many more blocks ``length`` positions need."""
        return -(-length // self.cache.block_size) - len(self.blocks)

    def reserve(self, length: int) -> None:
        """Allocate blocks for ``length`` positions in total. Raises IndexError if the cache is full."""
        self._add([self.cache.pool.take() for _ in range(self.missing(length))])

    def share(self, blocks: Sequence[int]) -> None:
        """Start with ``blocks`` that another sequence has filled."""
        assert not self.blocks
        for block in blocks:
            self.cache.pool.share(block)
        self._add(blocks)
        self.length = len(blocks) * self.cache.block_size

    def release(self) -> None:
        """Release all blocks and the table row. The object must not be used afterwards."""
        while self.blocks:
            self.cache.pool.release(self.blocks.pop())
        self.cache.free_rows.append(self.row)

    def _add(self, blocks: Sequence[int]) -> None:
        if not blocks:
            return
        start = len(self.blocks)
        self.blocks += blocks
        row = torch.tensor(blocks, dtype=torch.int32)
        self.cache.tables[self.row, start : len(self.blocks)] = row.to(self.cache.device, non_blocking=True)


# Segments of up to this many tokens are verified proposals: each token becomes a separate query.
_SHORT = 16


class RaggedContext:
    """The next ``count`` tokens of each of several sequences, one after another in one row [1, N].

    Each token attends to its own sequence's cache and to its predecessors in its segment; the blocks are
    reserved. ``separate``: each is a query of its own also in a long segment, whose bits then do not depend
    on the segment. If ``single``, every token is a separate query, and ``slots`` int64 [N], ``table`` int32
    [N, blocks] and ``lengths`` int32 [N] describe the step completely, as for ``PagedLayer.attend``.
    """

    def __init__(self, segments: Sequence[tuple[SequenceCache, int]], separate: bool = False) -> None:
        cache = segments[0][0].cache
        self.segments = segments
        self._layers, size = cache.layers, cache.block_size
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []  # of the table, for each token of the short segments
        short: list[int] = []  # indices of those tokens
        self._long: list[tuple[int, int, Tensor, int]] = []  # first token, end, blocks, first position
        for sequence, count in segments:
            start, at, blocks = sequence.length, len(positions), sequence.blocks
            if separate or count <= _SHORT:
                rows += [sequence.row] * count
                short += range(at, at + count)
            else:
                self._long.append((at, at + count, cache.tables[sequence.row], start))
            for position in range(start, start + count):
                positions.append(position)
                slots.append(blocks[position // size] * size + position % size)
        device = cache.device
        both = torch.tensor([positions, slots]).to(device, non_blocking=True)
        self.positions = both[:1]  # [1, N]
        self.slots = both[1]  # [N]
        self.rope_lengths: Tensor | None = None  # [1, N]
        if cache.rope_depends_on_length:
            longest = [sequence.longest for sequence, count in segments for _ in range(count)]
            self.rope_lengths = torch.tensor([longest], device=device)
        self.single = not self._long
        # No sequence has more blocks; the rest of the table is not read.
        self.longest_table = max(len(sequence.blocks) for sequence, _ in segments)
        self.lengths = self.positions[0].int() + 1
        self._starts: Tensor | None = None  # int32 [segments + 1], if all are computed in one call
        self._short: Tensor | None = None  # [S], indices of the short segments' tokens if there are others
        if self._long and cache.layers[0].flash:
            self._most = max(count for _, count in segments)
            rows = [sequence.row for sequence, _ in segments]
            ends = [0, *itertools.accumulate(count for _, count in segments)]
            seen = [sequence.length + count for sequence, count in segments]
            bounds = torch.tensor([*ends, *seen], dtype=torch.int32).to(device, non_blocking=True)
            self._starts, self.lengths = bounds[: len(ends)], bounds[len(ends) :]
        if rows:
            at_rows = torch.tensor(rows).to(device, non_blocking=True)
            self.table = cache.tables[at_rows, : self.longest_table]  # [S, blocks]
        if short and self._long and self._starts is None:
            self._short = torch.tensor(short).to(device, non_blocking=True)
            self.lengths = self.lengths[self._short]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q`` [1, H, N, head_dim], ``k`` and ``v`` [1, KV, N, head_dim] → [1, H, N, head_dim]."""
        pages = self._layers[layer]
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [N, heads, head_dim]
        pages.append(k, v, self.slots)
        if self.single:
            mixed = pages.attend(q, self.table, self.lengths)
        elif self._starts is not None:
            mixed = pages.extend(q, self._starts, self.table, self.lengths, self._most)
        else:
            mixed = q.new_empty(q.shape)
            if self._short is not None:
                mixed[self._short] = pages.attend(q[self._short], self.table, self.lengths)
            for first, end, blocks, start in self._long:
                mixed[first:end] = pages.prefill(q[first:end], blocks, start)
        return mixed.transpose(0, 1)[None]  # [1, H, N, head_dim]
