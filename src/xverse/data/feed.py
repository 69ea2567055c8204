"""Batches for pretraining and validation from what ``xverse data prepare`` wrote."""

from __future__ import annotations

import bisect
import functools
import queue
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from xverse.config import UserError, choose, is_url
from xverse.data.mixture import MixtureConfig
from xverse.data.packing import RUN, RUNS, PackedSequence, StreamPacker
from xverse.data.shards import Shard
from xverse.model import IGNORE
from xverse.place import fetch
from xverse.tokenizer import Tokenizer
from xverse.tokenizer.general import load_tokenizer_of

T = TypeVar("T")

# How a run's documents are shuffled, part of its identity: by source, or in ``StreamPacker``'s blocks.
ORDERS = ("shuffled as a whole", f"shuffled in blocks of {RUNS} runs of {RUN}")


@dataclass
class Batch:
    """``tokens`` int64 [B, T], ``targets`` int64 [B, T] (-100 for no loss), ``document_ids`` int32 [B, T]."""

    tokens: torch.Tensor
    targets: torch.Tensor
    document_ids: torch.Tensor

    def pinned(self) -> Batch:
        """The batch in pinned memory, from which copies to a GPU do not wait."""
        return Batch(self.tokens.pin_memory(), self.targets.pin_memory(), self.document_ids)


def collate(sequences: Sequence[PackedSequence]) -> Batch:
    """Stack packed sequences of one length into a batch."""
    columns = zip(*((one.tokens, one.targets, one.document_ids) for one in sequences), strict=True)
    return Batch(*(torch.from_numpy(np.stack(rows)) for rows in columns))


def _prepared(names: Collection[str]) -> list[str]:
    """The files of a prepared folder that a run reads."""
    if "report.json" not in names:
        raise UserError("data: the folder at the URL has no report.json, which data prepare writes last")
    return [name for name in names if name.startswith(("tokenizer/", "train/", "valid/"))]


class PretrainFeed:
    """The training and validation batches of a prepared folder, which at a URL is copied to the cache.

    The order is a pure function of (seed, step), independent of the number of processes. Caps and stages of a
    mixture need the number of ``sequences`` in the run, and of those ``before`` a step. Raises UserError for
    a folder that is not prepared, damaged shards and an impossible mixture.
    """

    def __init__(
        self,
        folder: str | Path,
        mixture: MixtureConfig,
        length: int,
        seed: int,
        sequences: int = 0,
        before: Callable[[int], int] | None = None,
    ) -> None:
        folder = fetch(str(folder), _prepared, "data") if is_url(folder) else folder
        self.folder, self.length = Path(folder), length
        if not (self.folder / "train").is_dir():
            raise UserError(
                f"{self.folder}: not a prepared folder (no train/ in it); run xverse data prepare first"
            )
        self.tokenizer = load_tokenizer_of(self.folder / "tokenizer")
        self.train = self._open("train")
        self.valid = self._open("valid")
        if not self.train:
            raise UserError(f"{self.folder / 'train'}: no token shard here; run xverse data prepare first")
        self.packers = {name: StreamPacker(shard, length, seed) for name, shard in self.train.items()}
        sizes = {name: packer.sequences_per_epoch for name, packer in self.packers.items()}
        headers = {name: shard.header for name, shard in self.train.items()}
        self.mixture = mixture.read().build(
            {name: header.tokens for name, header in headers.items()},
            sizes,
            {name: (header.category, header.language) for name, header in headers.items()},
            seed,
            sequences,
            before,
        )

    def _open(self, split: str) -> dict[str, Shard]:
        paths = sorted((self.folder / split).iterdir()) if (self.folder / split).is_dir() else []
        shards = {
            path.name: Shard.open(path) for path in paths if path.is_dir() and not path.name.startswith(".")
        }
        for shard in shards.values():
            if shard.header.tokenizer != self.tokenizer.hash:
                raise UserError(
                    f"{shard.path}: not encoded with {self.folder / 'tokenizer'}; prepare it again"
                )
        return shards

    @property
    def order(self) -> str:
        """How the documents are shuffled, one of ``ORDERS``."""
        return ORDERS[any(packer.blocks > 1 for packer in self.packers.values())]

    @property
    def valid_names(self) -> list[str]:
        """The sources with held-out text."""
        return list(self.valid)

    def sequence(self, n: int) -> PackedSequence:
        """The n-th sequence of the run."""
        source, k = self.mixture.locate(n)
        return self.packers[source].sequence(k)

    def batch(self, first: int, stop: int) -> Batch:
        """The run's sequences ``first`` to ``stop`` - 1."""
        return collate([self.sequence(n) for n in range(first, stop)])

    def valid_batches(
        self, name: str, batch_size: int, max_tokens: int | None = None
    ) -> Iterator[tuple[Batch, int]]:
        """Yield a source's held-out documents in order, as batches with the number of text bytes that they
        score.

        Every token of a document except the first is scored once. The bytes are those of the scored tokens,
        so bits per byte = sum of the loss in nats / ln 2 / sum of the bytes. End tokens are scored and have
        no bytes. A document split between sequences continues without its context. ``max_tokens``, rounded up
        to whole sequences, limits the work; the last sequence is padded, and the last batch may have fewer
        rows.
        """
        shard = choose("validation source", name, self.valid)
        total = min(shard.header.tokens, max_tokens or shard.header.tokens)
        rows = [self._valid_row(shard, start) for start in range(0, total, self.length)]
        for first in range(0, len(rows), batch_size):
            batch = collate(rows[first : first + batch_size])
            targets = batch.targets[batch.targets != IGNORE].numpy()
            yield batch, int(self.token_bytes[targets].sum())

    def _valid_row(self, shard: Shard, start: int) -> PackedSequence:
        stop = min(start + self.length, len(shard.tokens))
        filled = stop - start
        tokens = np.full(self.length, self.tokenizer.pad_id, np.int64)
        targets = np.full(self.length, IGNORE, np.int64)
        tokens[:filled] = shard.tokens[start:stop]
        following = shard.tokens[start + 1 : stop + 1]
        targets[: len(following)] = following
        places = np.arange(start, start + self.length)
        first = bisect.bisect_right(shard.offsets, start)
        ends = shard.offsets[first : bisect.bisect_right(shard.offsets, stop, first)]
        targets[ends - 1 - start] = IGNORE
        document = np.searchsorted(ends, places, side="right")  # padding is after the last one
        return PackedSequence(tokens, targets, document.astype(np.int32))

    @functools.cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        """See ``token_byte_lengths``."""
        return token_byte_lengths(self.tokenizer)


def token_byte_lengths(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """The number of UTF-8 bytes of each token, int64 [vocab_size]; 0 for special tokens."""
    lengths = [len(tokenizer.token_bytes(token_id)) for token_id in range(tokenizer.vocab_size)]
    lengths = [0 if i in tokenizer.special_ids else length for i, length in enumerate(lengths)]
    return np.array(lengths, np.int64)


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """Iterate with a thread that works up to ``depth`` items ahead; its errors are raised here."""
    ready: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(more: bool, item: T | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                ready.put((more, item), timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(True, item)
                if stopped.is_set():
                    return
            put(False, None)
        except BaseException as error:
            put(False, error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            more, item = ready.get()
            if not more:
                if isinstance(item, BaseException):
                    raise item
                return
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()
