"""Keys and values of all requests in blocks of positions, and the attention context that uses them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xverse import hardware
from xverse.config import UserError
from xverse.kernels.ops import advise_huge_pages
from xverse.kernels.paged_attention import PagedLayer
from xverse.model.config import XverseConfig

BLOCK_SIZE = 32
KV_DTYPES = ("auto", "int8")


class BlockPool:
    """Which of ``count`` blocks are taken, and by how many holders. A block that was freed last goes first:
    its memory is there already."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count

    @property
    def free(self) -> int:
        """How many blocks nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """A free block, held once. Raises IndexError where there is none."""
        block = self._free.pop()
        self._holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder of a block that is taken."""
        assert self._holders[block] > 0, f"block {block} is free"
        self._holders[block] += 1

    def holders(self, block: int) -> int:
        """How many hold it."""
        return self._holders[block]

    def release(self, block: int) -> None:
        """One holder less; without any the block is free."""
        assert self._holders[block] > 0, f"block {block} is free"
        self._holders[block] -= 1
        if not self._holders[block]:
            self._free.append(block)


class PagedCache:
    """Room for ``blocks`` blocks of BLOCK_SIZE positions, [blocks, layers, 2, H, BLOCK_SIZE, head_dim].

    ``kv_dtype`` "auto" stores in ``dtype``, "int8" with a float32 scale for each position and head. At most
    ``sequences`` sequences use it at once. On a CPU the memory counts only once it is written to; other
    devices take it at once. Raises UserError for another ``kv_dtype``, or where there is no such room.
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
    ) -> None:
        if kv_dtype not in KV_DTYPES:
            raise UserError(f"kv_dtype: '{kv_dtype}' is not one of {', '.join(KV_DTYPES)}")
        self.device = device
        shape = (blocks + 1, config.num_hidden_layers, 2, config.num_attention_heads, BLOCK_SIZE)
        stored = torch.int8 if kv_dtype == "int8" else dtype
        try:
            data = torch.empty(*shape, config.head_dim, dtype=stored, device=device)
            scales = torch.empty(shape, device=device) if kv_dtype == "int8" else None
        except RuntimeError as error:
            size = blocks * position_bytes(config, dtype, kv_dtype) * BLOCK_SIZE / 1e9
            raise UserError(
                f"max_cache_tokens: no room for a cache of {blocks * BLOCK_SIZE} tokens ({size:.1f} GB)"
            ) from error
        scaling = config.rope_scaling
        self.rope_depends_on_length = scaling is not None and scaling.rope_type == "dynamic"
        self.pool = BlockPool(blocks)
        self.scratch = blocks  # a block that nobody reads
        # The blocks of each sequence in order; places without a block name block 0, and kernels look at no
        # more than a sequence's positions.
        width = -(-config.context_length // BLOCK_SIZE)
        self.tables = torch.zeros(sequences, width, dtype=torch.int32, device=device)
        self.free_rows = list(range(sequences - 1, -1, -1))
        advise_huge_pages(data)
        self.layers = [
            PagedLayer(
                data[:, layer, 0],
                data[:, layer, 1],
                None if scales is None else scales[:, layer, 0],
                None if scales is None else scales[:, layer, 1],
            )
            for layer in range(config.num_hidden_layers)
        ]


def position_bytes(config: XverseConfig, dtype: torch.dtype, kv_dtype: str = "auto") -> int:
    """Bytes that one position of one request takes in all layers."""
    vector = config.head_dim + 4 if kv_dtype == "int8" else config.head_dim * dtype.itemsize
    return 2 * config.num_hidden_layers * config.num_attention_heads * vector


def cache_tokens(
    wanted: int | None, bytes_each: int, device: torch.device, *, longest: int, most: int
) -> int:
    """How many tokens the cache is to hold: ``wanted``, or what half of the free memory holds, at least one
    sequence of the ``longest`` kind and at most ``most``.

    Raises UserError for more than the memory holds: on a CPU the cache takes memory as it is written to, and
    would fail much later.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else hardware.memory()[1]
    if wanted is None:
        return most if free is None else min(most, max(longest, free // 2 // bytes_each))
    if wanted < BLOCK_SIZE:
        raise UserError(f"max_cache_tokens: {wanted} is out of range (at least {BLOCK_SIZE})")
    if free is not None and wanted * bytes_each > free:
        raise UserError(
            f"max_cache_tokens: {wanted} tokens of cache take {wanted * bytes_each / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB of memory are free; {free // bytes_each} would fit"
        )
    return wanted


class SequenceCache:
    """One request's blocks in order, of which ``length`` positions are written, of ``longest`` that it may
    ever have."""

    def __init__(self, cache: PagedCache, longest: int) -> None:
        self.cache = cache
        self.longest = longest
        self.length = 0
        self.blocks: list[int] = []
        self.row = cache.free_rows.pop()

    def missing(self, length: int) -> int:
        """How many blocks more ``length`` positions need."""
        return -(-length // BLOCK_SIZE) - len(self.blocks)

    def reserve(self, length: int) -> None:
        """Take blocks for ``length`` positions in all. Raises IndexError where the cache is full."""
        for _ in range(self.missing(length)):
            self._add(self.cache.pool.take())

    def share(self, blocks: Sequence[int]) -> None:
        """Begin with ``blocks`` that another sequence has filled."""
        assert not self.blocks
        for block in blocks:
            self.cache.pool.share(block)
            self._add(block)
        self.length = len(blocks) * BLOCK_SIZE

    def release(self) -> None:
        """Give all blocks back, and the row of the table; it is of no use any more."""
        while self.blocks:
            self.cache.pool.release(self.blocks.pop())
        self.cache.free_rows.append(self.row)

    def _add(self, block: int) -> None:
        self.cache.tables[self.row, len(self.blocks)] = block
        self.blocks.append(block)


# Segments of up to so many tokens are guesses to verify: each token is a query of its own.
_SHORT = 16


class RaggedContext:
    """The next ``count`` tokens of each of several sequences in one row of tokens [1, N], one after another.

    Each token sees its own sequence's cache and what comes before it here. Room for them is reserved.
    ``single`` is true where every token is a query of its own: then ``slots`` int64 [N], ``table`` int32
    [N, blocks] and ``lengths`` int32 [N] say all that there is to know, as for ``PagedLayer.attend``.
    """

    def __init__(self, segments: Sequence[tuple[SequenceCache, int]]) -> None:
        cache = segments[0][0].cache
        self._layers = cache.layers
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []  # of the table, for tokens of short segments
        places: list[int] = []  # where those tokens are
        self._long: list[tuple[int, int, Tensor, int]] = []  # first token, end, blocks, first position
        for sequence, count in segments:
            start, at, blocks = sequence.length, len(positions), sequence.blocks
            if count <= _SHORT:
                rows += [sequence.row] * count
                places += range(at, at + count)
            else:
                self._long.append((at, at + count, cache.tables[sequence.row], start))
            for position in range(start, start + count):
                positions.append(position)
                slots.append(blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        device = cache.device
        self.positions = torch.tensor([positions], device=device)  # [1, N]
        self.slots = torch.tensor(slots, device=device)  # [N]
        self.rope_lengths: Tensor | None = None  # [1, N]
        if cache.rope_depends_on_length:
            longest = [sequence.longest for sequence, count in segments for _ in range(count)]
            self.rope_lengths = torch.tensor([longest], device=device)
        self.single = not self._long
        # No sequence has more blocks: what lies to their right in the table need not be looked at.
        self.longest_table = max(len(sequence.blocks) for sequence, _ in segments)
        self.lengths = self.positions[0].int() + 1
        self._places: Tensor | None = None  # [S], of the short segments' tokens where there are others
        if rows:
            self.table = cache.tables[torch.tensor(rows, device=device), : self.longest_table]  # [S, blocks]
        if rows and self._long:
            self._places = torch.tensor(places, device=device)
            self.lengths = self.lengths[self._places]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pages = self._layers[layer]
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [N, H, head_dim]
        pages.append(k, v, self.slots)
        if self.single:
            mixed = pages.attend(q, self.table, self.lengths)
        else:
            mixed = q.new_empty(q.shape)
            if self._places is not None:
                mixed[self._places] = pages.attend(q[self._places], self.table, self.lengths)
            for first, end, blocks, start in self._long:
                mixed[first:end] = pages.prefill(q[first:end], blocks, start)
        return mixed.transpose(0, 1)[None]  # [1, H, N, head_dim]
