"""Rows of a data set that is larger than memory: read and encoded as they are needed, again from the first
where a run goes on. What the n-th row holds depends on the files and the settings alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.utils.data import Dataset

from xverse.data.order import random_order
from xverse.data.packing import pack_examples
from xverse.finetune.encode import Example


class Stream(Dataset[list[Example]]):
    """``count`` rows of what ``read()`` gives, from its beginning again where it ends.

    ``buffer`` examples at a time are mixed by ``seed`` and, with ``length``, packed into rows of so many
    tokens. Rows are asked for in rising order; the way to a later one leads through all before it.
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
        window, held = 0, []
        while True:
            for example in self.read():
                held.append(example)
                if len(held) == self.buffer:
                    yield from self._mixed(held, window)
                    window, held = window + 1, []
            if held:
                yield from self._mixed(held, window)
                window, held = window + 1, []

    def _mixed(self, examples: list[Example], window: int) -> list[list[Example]]:
        order = random_order(len(examples), "stream", self.seed, window).tolist()
        rows = [[examples[i]] for i in order]
        if self.length is not None:
            packed = pack_examples([len(examples[i].ids) for i in order], self.length)
            rows = [[examples[order[i]] for i in row] for row in packed]
            rows = [rows[i] for i in random_order(len(rows), "rows", self.seed, window)]
        return rows
