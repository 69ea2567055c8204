"""Automatic prefix cache: full blocks of tokens that a request has computed are found by their content.

A block's key is a digest of its tokens and of all preceding ones (a hash chain, as in vLLM's automatic prefix
caching), so common prefixes are found without a tree.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from xverse.engine.cache import BLOCK_SIZE, BlockPool


def extend_digests(
    digests: list[bytes], tokens: Sequence[int], salt: bytes = b"", size: int = BLOCK_SIZE
) -> None:
    """Append the digests of the full blocks, of ``size`` tokens, of ``tokens`` that ``digests`` lacks.

    SHA-256, because a collision would reveal one user's text to another. ``salt`` separates blocks whose
    contents depend on more than the tokens.
    """
    for index in range(len(digests), len(tokens) // size):
        block = array("q", tokens[index * size : (index + 1) * size])
        before = digests[-1] if digests else salt
        digests.append(hashlib.sha256(before + block.tobytes()).digest())


class PrefixCache:
    """Digests and the blocks that hold their keys and values, at most ``blocks_at_most`` of them.

    The cache is one holder of each of its blocks. The least recently used block is evicted first, and of one
    text the end before the beginning, because blocks are found from the beginning on.
    """

    def __init__(self, pool: BlockPool, blocks_at_most: int) -> None:
        self._pool = pool
        self.blocks_at_most = blocks_at_most
        self._blocks: OrderedDict[bytes, int] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of ``digests``."""
        blocks: list[int] = []
        for digest in digests:
            block = self._blocks.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def touch(self, digests: Sequence[bytes]) -> None:
        """Mark them as used now."""
        for digest in reversed(digests):
            if digest in self._blocks:
                self._blocks.move_to_end(digest)

    def add(self, digest: bytes, block: int) -> None:
        """Cache a full block, unless an equal one is cached or the cache is full.

        Only blocks without another holder are evicted, so a text longer than the cache keeps its beginning.
        """
        if digest in self._blocks or (len(self._blocks) >= self.blocks_at_most and not self.free(1)):
            return
        self._pool.share(block)
        self._blocks[digest] = block

    def idle(self) -> int:
        """How many blocks have no other holder and can be freed."""
        return sum(self._pool.holders(block) == 1 for block in self._blocks.values())

    def free(self, count: int) -> int:
        """Evict up to ``count`` blocks without another holder; returns how many."""
        victims: list[bytes] = []
        for digest, block in self._blocks.items():
            if len(victims) == count:
                break
            if self._pool.holders(block) == 1:
                victims.append(digest)
        for digest in victims:
            self._pool.release(self._blocks.pop(digest))
        return len(victims)
