"""The scheduler: continuous batching with chunked prefill.

Requests are served in order of arrival. Blocks are allocated as a request grows. If none is free, unused
blocks of the prefix cache are evicted; then the most recent request is preempted: it waits again, ahead of
the others, and recomputes its cache when there is room.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice

from xverse.engine.cache import PagedCache, SequenceCache
from xverse.engine.prefix import PrefixCache
from xverse.engine.sequence import Sequence

# While others decode, a step on a CPU prefills only a fraction of a chunk, because they wait for it. On a GPU
# a step of a whole chunk is short.
_SHARED_CHUNK = 4


@dataclass(slots=True)
class Work:
    """The next ``count`` tokens of a sequence, followed by ``proposed`` ones to verify."""

    sequence: Sequence
    count: int
    proposed: list[int]
    forced: bool = False  # proposed by the request's constraint


class Scheduler:
    """``running`` and ``waiting`` sequences, in order of arrival."""

    def __init__(
        self, cache: PagedCache, prefixes: PrefixCache, *, max_batch: int, prefill_chunk: int, copies: bool
    ) -> None:
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.preemptions = 0
        self.reused_tokens = 0
        self._cache = cache
        self._prefixes = prefixes
        self._max_batch = max_batch
        self._prefill_chunk = prefill_chunk
        # Blocks that a running sequence is about to compute; others wait for them.
        self._coming: dict[bytes, Sequence] = {}
        # Running sequences by their prompt, whose last, partly filled block is copied for others with it.
        self._leaders: dict[bytes, Sequence] = {}
        self._copies = copies and prefixes.blocks_at_most > 0

    def schedule(self) -> list[Work]:
        """The work of the next step, with its blocks reserved. Empty if there are no sequences."""
        work = [
            Work(sequence, 1, [])
            for sequence in list(self.running)
            if sequence.cache is not None
            and sequence.pending == 1
            and self._reserve(sequence, len(sequence.tokens))
        ]
        budget = self._prefill_chunk
        if work:
            budget = max(
                1, budget // _SHARED_CHUNK if self._cache.device.type == "cpu" else budget - len(work)
            )
        for sequence in list(self.running):
            if budget and sequence.cache is not None and sequence.pending > 1:
                budget -= self._prefill(sequence, budget, work)
        while budget and (admitted := self._admit()) is not None:
            budget -= self._prefill(admitted, budget, work)
        return [item for item in work if item.sequence.cache is not None]  # others were preempted meanwhile

    def find(self, handle: int) -> Sequence | None:
        """The running or waiting sequence of a handle."""
        everything = (*self.running, *self.waiting)
        return next((sequence for sequence in everything if sequence.handle == handle), None)

    def propose(self, item: Work, tokens: list[int]) -> None:
        """Append ``tokens`` to the item for verification, if blocks for them are free."""
        cache = item.sequence.cache
        assert cache is not None
        missing = cache.missing(len(item.sequence.tokens) + len(tokens))
        if missing <= self._cache.pool.free:
            cache.reserve(len(item.sequence.tokens) + len(tokens))
            item.proposed = tokens

    def computed(self, sequence: Sequence, count: int) -> None:
        """Record that ``count`` more tokens are in the cache; full blocks enter the prefix cache."""
        cache = sequence.cache
        assert cache is not None
        cache.length += count
        full = cache.length // self._cache.block_size
        if full > sequence.registered:
            digests = sequence.full_digests()
            for index in range(sequence.registered, full):
                self._arrived(sequence, digests[index])
                self._prefixes.add(digests[index], cache.blocks[index])
            sequence.registered = full

    def retire(self, sequence: Sequence) -> None:
        """Remove a running sequence and release its blocks."""
        self.running.remove(sequence)
        self._leave(sequence)

    def _prefill(self, sequence: Sequence, budget: int, work: list[Work]) -> int:
        count = min(sequence.pending, budget)
        if not self._reserve(sequence, sequence.computed + count):
            return 0
        work.append(Work(sequence, count, []))
        return count

    def _admit(self) -> Sequence | None:
        """Start the first waiting sequence for which there is room: for all of its tokens, and for one more
        block of each running sequence."""
        if len(self.running) >= self._max_batch:
            return None
        for sequence in islice(self.waiting, self._max_batch):
            digests = sequence.reusable()
            cached = self._prefixes.find(digests)
            if len(cached) < len(digests) and digests[len(cached)] in self._coming:
                continue
            prompt = sequence.whole_digest() if self._copies else None
            leader = None if prompt is None else self._leaders.get(prompt)
            if leader is not None and leader.computed < len(sequence.tokens) - 1:
                continue
            cache = SequenceCache(self._cache, sequence.most_tokens)
            cache.share(cached)
            if not self._room(cache.missing(len(sequence.tokens)) + len(self.running)):
                cache.release()
                return None
            sequence.cache = cache
            if leader is not None and leader.cache is not None and len(cached) == len(digests):
                self._copy_last(leader.cache, sequence)
            if prompt is not None:
                self._leaders[prompt] = sequence
            self.reused_tokens += cache.length
            if len(sequence.tokens) == sequence.prompt_tokens:  # not resumed after preemption
                sequence.reused = cache.length
            sequence.registered = len(cached)
            self._prefixes.touch(digests[: len(cached)])
            if self._prefixes.blocks_at_most:
                for digest in digests[len(cached) :]:
                    self._coming.setdefault(digest, sequence)
            self.waiting.remove(sequence)
            self.running.append(sequence)
            self.running.sort(key=lambda running: running.handle)
            return sequence
        return None

    def _copy_last(self, leader: SequenceCache, sequence: Sequence) -> None:
        """Take what ``leader`` has computed of the prompt's last block, up to the token before the last."""
        cache, length = sequence.cache, len(sequence.tokens) - 1
        assert cache is not None
        if length > cache.length and self._reserve(sequence, length):
            self._cache.copy(leader.blocks[len(cache.blocks) - 1], cache.blocks[-1])
            cache.length = length

    def _room(self, blocks: int) -> bool:
        free = self._cache.pool.free
        return blocks <= free or blocks <= free + self._prefixes.idle()

    def _reserve(self, sequence: Sequence, length: int) -> bool:
        """Allocate the blocks for ``length`` positions, evicting and preempting if necessary. False if the
        sequence itself was preempted."""
        pool = self._cache.pool
        while sequence.cache is not None:
            missing = sequence.cache.missing(length) - pool.free
            if missing <= 0 or self._prefixes.free(missing) == missing:
                sequence.cache.reserve(length)
                return True
            self._preempt(self.running[-1])
        return False

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.retire(sequence)
        if sequence.prompted is not None and sequence.scoring:
            sequence.prompted.reset()
        self.waiting.appendleft(sequence)

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.cache is not None
        for digest in sequence.digests[sequence.registered :]:
            self._arrived(sequence, digest)
        self._leaders = {key: leader for key, leader in self._leaders.items() if leader is not sequence}
        self._prefixes.touch(sequence.digests[: sequence.registered])
        sequence.cache.release()
        sequence.cache, sequence.registered = None, 0

    def _arrived(self, sequence: Sequence, digest: bytes) -> None:
        if self._coming.get(digest) is sequence:
            del self._coming[digest]
