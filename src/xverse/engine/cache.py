"""Keys and values of all requests in blocks of positions, and the attention contexts that use them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xverse.config import UserError
from xverse.model.config import XverseConfig
from xverse.quant.attention import PagedLayer
from xverse.quant.ops import advise_huge_pages

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

    def release(self, block: int) -> None:
        """One holder less; without any the block is free."""
        assert self._holders[block] > 0, f"block {block} is free"
        self._holders[block] -= 1
        if not self._holders[block]:
            self._free.append(block)


class PagedCache:
    """Room for ``blocks`` blocks of BLOCK_SIZE positions, [blocks, layers, 2, H, BLOCK_SIZE, head_dim].

    ``kv_dtype`` "auto" stores in ``dtype``, "int8" with a float32 scale for each position and head. On a CPU
    the memory counts only once it is written to; other devices take it at once. Raises UserError for another
    ``kv_dtype``, or where there is no such room.
    """

    def __init__(
        self,
        config: XverseConfig,
        dtype: torch.dtype,
        device: torch.device,
        *,
        blocks: int,
        kv_dtype: str = "auto",
    ) -> None:
        if kv_dtype not in KV_DTYPES:
            raise UserError(f"kv_dtype: '{kv_dtype}' is not one of {', '.join(KV_DTYPES)}")
        self.device = device
        self.blocks_per_sequence = -(-config.max_position_embeddings // BLOCK_SIZE)
        shape = (blocks, config.num_hidden_layers, 2, config.num_attention_heads, BLOCK_SIZE)
        stored = torch.int8 if kv_dtype == "int8" else dtype
        try:
            data = torch.empty(*shape, config.head_dim, dtype=stored, device=device)
            scales = torch.empty(shape, device=device) if kv_dtype == "int8" else None
        except RuntimeError as error:
            size = blocks * position_bytes(config, dtype, kv_dtype) * BLOCK_SIZE / 1e9
            raise UserError(
                f"max_cache_tokens: no room for a cache of {blocks * BLOCK_SIZE} tokens ({size:.1f} GB)"
            ) from error
        self.pool = BlockPool(blocks)
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


class SequenceCache:
    """One request's blocks in order, of which ``length`` positions are written."""

    def __init__(self, cache: PagedCache) -> None:
        self.length = 0
        self.blocks: list[int] = []
        # Places without a block name block 0: kernels look at no more than `length` positions.
        self.table = torch.zeros(cache.blocks_per_sequence, dtype=torch.int32, device=cache.device)
        self.cache = cache

    def reserve(self, length: int) -> None:
        """Take blocks for ``length`` positions in all. Raises IndexError where the cache is full."""
        while len(self.blocks) * BLOCK_SIZE < length:
            self.table[len(self.blocks)] = block = self.cache.pool.take()
            self.blocks.append(block)

    def release(self) -> None:
        """Give all blocks back."""
        while self.blocks:
            self.cache.pool.release(self.blocks.pop())
        self.length = 0


class PrefillContext:
    """A chunk of ``length`` prompt tokens of one request, which see the cache before them and each other."""

    def __init__(self, sequence: SequenceCache, length: int) -> None:
        self._start, end = sequence.length, sequence.length + length
        sequence.reserve(end)
        positions = torch.arange(self._start, end, device=sequence.cache.device)  # [T]
        self._layers, self._table = sequence.cache.layers, sequence.table
        self._slots = self._table[positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        self.positions = positions[None]  # [1, T]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pages = self._layers[layer]
        pages.append(k[0].transpose(0, 1), v[0].transpose(0, 1), self._slots)
        mixed = pages.prefill(q[0].transpose(0, 1), self._table, self._start)  # [T, H, head_dim]
        return mixed.transpose(0, 1)[None]


class DecodeContext:
    """One token of each of several requests: one batch for the linears and for attention."""

    def __init__(self, sequences: Sequence[SequenceCache]) -> None:
        first = sequences[0]
        device = first.cache.device
        for sequence in sequences:
            sequence.reserve(sequence.length + 1)
        lengths = [sequence.length for sequence in sequences]
        slots = [
            sequence.blocks[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
            for sequence, at in zip(sequences, lengths, strict=True)
        ]
        self._layers = first.cache.layers
        tables = [sequence.table for sequence in sequences]
        self._table = tables[0][None] if len(tables) == 1 else torch.stack(tables)  # [B, blocks]
        self.positions = torch.tensor(lengths, device=device)[:, None]  # [B, 1]
        self._slots = torch.tensor(slots, device=device)
        self._lengths = (self.positions[:, 0] + 1).int()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pages = self._layers[layer]
        pages.append(k[:, :, 0], v[:, :, 0], self._slots)
        return pages.attend(q[:, :, 0], self._table, self._lengths)[:, :, None]  # [B, H, 1, head_dim]
