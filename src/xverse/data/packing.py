"""Packed sequences: several documents in a row of fixed length, which do not attend to each other.

For pretraining, ``StreamPacker`` cuts an endless stream of shuffled documents into sequences without padding.
For fine-tuning, ``pack_examples`` puts whole examples into bins by best fit.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from xverse.data.order import random_order
from xverse.data.shards import Shard
from xverse.model import IGNORE


@dataclass
class PackedSequence:
    """One row: ``tokens`` int64 [T], ``targets`` int64 [T] (-100 for no loss), ``document_ids`` int32 [T].

    ``targets[i]`` is the token that follows ``tokens[i]`` in the same document.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    document_ids: NDArray[np.int32]


RUN = 256  # neighbouring documents, which stay in one block
RUNS = 256  # per block
BLOCK = RUN * RUNS


@dataclass
class _Block:
    """A part of an epoch: its documents in order, and the end of each in the block, both int64
    [documents]."""

    start: int
    order: NDArray[np.int64]
    ends: NDArray[np.int64]


class StreamPacker:
    """Cuts a shard's documents, shuffled anew in each epoch, into sequences of ``length`` tokens.

    Epochs follow each other without a gap: in each epoch every token is in exactly one sequence, and a
    sequence may contain the end of one epoch and the start of the next. A split document continues as the
    first document of the next sequence; its last token here keeps its target. ``sequence(k)`` is a pure
    function of (shard, length, seed, k).

    The memory of the shuffle does not grow with the number of documents, of which a large source has
    billions: runs of ``run`` neighbours are shuffled, then the documents within blocks of ``block``. Only the
    current block is in memory. A shard of one block is shuffled as a whole.
    """

    def __init__(self, shard: Shard, length: int, seed: int, run: int = RUN, block: int = BLOCK) -> None:
        assert length > 0
        assert block % run == 0
        self.shard, self.length, self.seed = shard, length, seed
        self.tokens_per_epoch = shard.header.tokens
        self._run, self._runs = run, block // run
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._block = lru_cache(maxsize=2)(self._make_block)

    @property
    def blocks(self) -> int:
        """The number of blocks, which are shuffled separately."""
        return -(-len(self.shard) // (self._run * self._runs))

    @property
    def sequences_per_epoch(self) -> int:
        """The number of sequences in an epoch, rounded up."""
        return -(-self.tokens_per_epoch // self.length)

    def _make_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The order of an epoch's runs, int64 [runs], and the ends of their blocks in tokens, int64
        [blocks]."""
        count = -(-len(self.shard) // self._run)
        if self.blocks == 1:
            return np.arange(count), np.array([self.tokens_per_epoch])
        order = random_order(count, "runs", self.seed, self.shard.name, epoch)
        bounds = np.append(self.shard.offsets[0 : len(self.shard) : self._run], self.tokens_per_epoch)
        tokens = np.diff(bounds)[order]
        return order, np.cumsum(np.add.reduceat(tokens, np.arange(0, count, self._runs)))

    def _make_block(self, epoch: int, number: int) -> _Block:
        runs, ends = self._epoch(epoch)
        starts = runs[number * self._runs : (number + 1) * self._runs] * self._run
        documents = (starts[:, None] + np.arange(self._run)).ravel()
        documents = documents[documents < len(self.shard)]
        lengths = self.shard.offsets[documents + 1] - self.shard.offsets[documents]
        key = ("documents", self.seed, self.shard.name, epoch)
        order = random_order(len(documents), *key, *([number] if number else ()))
        return _Block(int(ends[number - 1]) if number else 0, documents[order], np.cumsum(lengths[order]))

    def sequence(self, k: int) -> PackedSequence:
        """The k-th sequence of the stream."""
        return self._cut(k * self.length, self.length)

    def _cut(self, start: int, length: int) -> PackedSequence:
        tokens = np.empty(length, np.int64)
        targets = np.full(length, IGNORE, np.int64)
        document_ids = np.empty(length, np.int32)
        epoch, position = divmod(start, self.tokens_per_epoch)
        part = int(np.searchsorted(self._epoch(epoch)[1], position, side="right"))
        block = self._block(epoch, part)
        position -= block.start
        place = int(np.searchsorted(block.ends, position, side="right"))
        filled = number = 0
        while filled < length:
            if place == len(block.order):
                part, place, position = part + 1, 0, 0
                if part == self.blocks:
                    epoch, part = epoch + 1, 0
                block = self._block(epoch, part)
            document = self.shard.document(int(block.order[place]))
            first = position - (int(block.ends[place]) - len(document))
            piece = document[first : first + length - filled]
            following = document[first + 1 : first + 1 + length - filled]
            tokens[filled : filled + len(piece)] = piece
            targets[filled : filled + len(following)] = following
            document_ids[filled : filled + len(piece)] = number
            filled += len(piece)
            position += len(piece)
            number += 1
            place += 1
        return PackedSequence(tokens, targets, document_ids)


def pack_examples(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Pack examples of the given lengths into bins of ``length`` by best-fit decreasing.

    Returns the indices of each bin's examples. Examples are not split; each length must be from 1 to
    ``length``.
    """
    assert all(0 < size <= length for size in lengths)
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # sorted (free tokens, bin), so the first that fits is the tightest
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(room, (lengths[index], 0))
        if place < len(room):
            free, target = room.pop(place)
        else:
            free, target = length, len(bins)
            bins.append([])
        bins[target].append(index)
        if free > lengths[index]:
            insort(room, (free - lengths[index], target))
    return bins
