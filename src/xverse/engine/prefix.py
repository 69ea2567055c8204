"""Automatic prefix cache: full blocks of tokens that some request computed are found again by their content.

A block is known by a digest of its own tokens and of all before them (a hash chain, as in vLLM's automatic
prefix caching), so what two requests share is found without a tree.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from xverse.engine.cache import BLOCK_SIZE, BlockPool


def extend_digests(digests: list[bytes], tokens: Sequence[int], salt: bytes = b"") -> None:
    """Append the digests of the full blocks of ``tokens`` that ``digests`` lacks.

    SHA-256, because a collision would show one user's text to another. ``salt`` keeps apart what does not
    depend on the tokens alone.
    """
    for index in range(len(digests), len(tokens) // BLOCK_SIZE):
        block = array("q", tokens[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
        before = digests[-1] if digests else salt
        digests.append(hashlib.sha256(before + block.tobytes()).digest())


class PrefixCache:
    """Digests and the blocks that hold their keys and values; at most ``blocks_at_most`` of them.

    The cache is one holder of each of its blocks. The longest unused goes first, and of one text the end
    before the beginning, without which it could not be found.
    """

    def __init__(self, pool: BlockPool, blocks_at_most: int) -> None:
        self._pool = pool
        self.blocks_at_most = blocks_at_most
        self._blocks: OrderedDict[bytes, int] = OrderedDict()  # the longest unused first

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks of the longest beginning of ``digests`` that is here."""
        found: list[int] = []
        for digest in digests:
            block = self._blocks.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def touch(self, digests: Sequence[bytes]) -> None:
        """They were used just now."""
        for digest in reversed(digests):
            if digest in self._blocks:
                self._blocks.move_to_end(digest)

    def add(self, digest: bytes, block: int) -> None:
        """Keep a full block, unless there is one of the same content or no room.

        Room is made by what nobody uses: a text longer than all of it keeps its beginning.
        """
        if digest in self._blocks or (len(self._blocks) >= self.blocks_at_most and not self.free(1)):
            return
        self._pool.share(block)
        self._blocks[digest] = block

    def idle(self) -> int:
        """How many of the blocks nobody else holds: so many can be freed."""
        return sum(self._pool.holders(block) == 1 for block in self._blocks.values())

    def free(self, count: int) -> int:
        """Forget up to ``count`` blocks that nobody else holds; returns how many."""
        victims: list[bytes] = []
        for digest, block in self._blocks.items():
            if len(victims) == count:
                break
            if self._pool.holders(block) == 1:
                victims.append(digest)
        for digest in victims:
            self._pool.release(self._blocks.pop(digest))
        return len(victims)
