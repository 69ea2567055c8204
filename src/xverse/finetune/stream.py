"""Rows of a dataset that is larger than memory, read and encoded as they are needed. The n-th row depends on
the files and the settings alone; a resumed run reads the data again from the start."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.utils.data import Dataset

from xverse.data.order import random_order
from xverse.data.packing import pack_examples
from xverse.finetune.encode import Example


class Stream(Dataset[list[Example]]):
    """``count`` rows of the examples of ``read()``, which starts again when it ends.

    ``buffer`` examples at a time are shuffled by ``seed`` and, with ``length``, packed into rows of at most
    so many tokens. Request rows in increasing order; skipping ahead reads and discards every row in between.
    """

    def __init__(
        self, read: Callable[[], Iterator[Example]], count: int, buffer: int, length: int | None, seed: int
    ) -> None:
        self.read, self.count, self.buffer, self.length, self.seed = read, count, buffer, length, seed
        self._rows, self._next = self._all(), 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> list[Example]:
        if number < self._next:
            self._rows, self._next = self._all(), 0
        while True:
            row = next(self._rows)
            self._next += 1
            if self._next > number:
                return row

    def _all(self) -> Iterator[list[Example]]:
        window, pending = 0, []
        while True:
            for example in self.read():
                pending.append(example)
                if len(pending) == self.buffer:
                    yield from self._shuffled(pending, window)
                    window, pending = window + 1, []
            if pending:
                yield from self._shuffled(pending, window)
                window, pending = window + 1, []

    def _shuffled(self, examples: list[Example], window: int) -> list[list[Example]]:
        order = random_order(len(examples), "stream", self.seed, window).tolist()
        rows = [[examples[i]] for i in order]
        if self.length is not None:
            packed = pack_examples([len(examples[i].ids) for i in order], self.length)
            rows = [[examples[order[i]] for i in row] for row in packed]
            rows = [rows[i] for i in random_order(len(rows), "rows", self.seed, window)]
        return rows
