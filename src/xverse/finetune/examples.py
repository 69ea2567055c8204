"""Dialogues to packed training rows, in an order that is a pure function of (seed, step)."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from xverse.config import UserError
from xverse.data.dialogues.instructions import SUFFIXES, InstructionReport, read_dialogues
from xverse.data.feed import Batch, collate
from xverse.data.order import random_order
from xverse.data.packing import pack_examples, packed_from_examples
from xverse.log import notice
from xverse.tokenizer import Tokenizer, encode_dialogue

PLACEHOLDER = re.compile(r"\{\{\s*\w+\s*\}\}")  # left by data sets that the user is to fill in with a name
WINDOW = 2000  # examples that are packed together: enough to fill rows well, few enough to mix lengths

Example = tuple[list[int], list[bool]]


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """A file of instructions, or a folder of which every file is a dataset of its own.

    ``repeat`` is how often it stands in an epoch; ``max_examples`` bounds each file (0: all), spread evenly
    over it; examples with an answer of more than ``max_reply_tokens`` are left out (0: none).
    """

    path: Path
    repeat: int = 1
    max_examples: int = 0
    max_reply_tokens: int = 0

    def __post_init__(self) -> None:
        if self.repeat < 1 or self.max_examples < 0 or self.max_reply_tokens < 0:
            raise ValueError("repeat must be at least 1; max_examples and max_reply_tokens at least 0")


@dataclass
class Dataset:
    """The encoded examples of one file, split into training and held-out ones."""

    name: str
    repeat: int
    train: list[Example] = field(default_factory=list)
    valid: list[Example] = field(default_factory=list)


def load_datasets(
    configs: list[DatasetConfig], tokenizer: Tokenizer, *, length: int, valid_share: float, seed: int
) -> list[Dataset]:
    """Read and encode every dataset; says what was left out and why.

    ``valid_share`` of each file, chosen by ``seed``, is held out. Examples of more than ``length`` tokens
    are left out. Raises UserError for a missing path and where nothing usable is found.
    """
    datasets = []
    for config in configs:
        files = [config.path]
        if config.path.is_dir():
            files = sorted(p for p in config.path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
        found = []
        for file in files:
            try:
                found.append(_load_file(file, config, tokenizer, length, valid_share, seed))
            except UserError as error:
                if not config.path.is_dir():
                    raise
                notice(f"left out: {error}")
        if not any(dataset.train for dataset in found):
            raise UserError(f"{config.path}: no usable instructions here")
        datasets += found
    return datasets


def _load_file(
    file: Path, config: DatasetConfig, tokenizer: Tokenizer, length: int, valid_share: float, seed: int
) -> Dataset:
    report = InstructionReport()
    dialogues = read_dialogues(file, report)
    dropped: Counter[str] = Counter()
    examples: list[Example] = []
    for dialogue in dialogues:
        if any(PLACEHOLDER.search(message["content"]) for message in dialogue.messages):
            dropped["with an unfilled {{placeholder}}"] += 1
            continue
        ids, mask = encode_dialogue(tokenizer, dialogue.messages)
        if len(ids) > length:
            dropped[f"of more than {length} tokens"] += 1
        elif config.max_reply_tokens and sum(mask) > config.max_reply_tokens * _replies(dialogue.messages):
            dropped[f"with answers of more than {config.max_reply_tokens} tokens"] += 1
        else:
            examples.append((ids, mask))
    order = random_order(len(examples), "split", seed, file.name).tolist()
    if config.max_examples:
        order = order[: config.max_examples]
    held_out = int(len(order) * valid_share)
    dataset = Dataset(
        file.name,
        config.repeat,
        [examples[i] for i in order[held_out:]],
        [examples[i] for i in order[:held_out]],
    )
    text = f"{file.name}: {report.describe()}"
    if dropped:
        text += "; left out " + ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    notice(f"{text}; {len(dataset.train)} to train on, {len(dataset.valid)} held out")
    return dataset


def _replies(messages: list[dict[str, str]]) -> int:
    return sum(message["role"] == "assistant" for message in messages)


class ExampleFeed:
    """Packed batches of whole examples. Each epoch shuffles anew all examples of all datasets, packs them
    by windows and shuffles the rows; epochs follow each other without a gap."""

    def __init__(self, datasets: list[Dataset], length: int, pad_id: int, seed: int) -> None:
        self.length, self.pad_id, self.seed = length, pad_id, seed
        self.examples = [
            example for dataset in datasets for _ in range(dataset.repeat) for example in dataset.train
        ]
        self.tokens_per_epoch = sum(len(ids) for ids, _ in self.examples)
        self._rows = lru_cache(maxsize=2)(self._make_rows)
        self._starts = [0]  # the first row of each epoch

    def _make_rows(self, epoch: int) -> list[list[int]]:
        order = random_order(len(self.examples), "examples", self.seed, epoch).tolist()
        rows: list[list[int]] = []
        for start in range(0, len(order), WINDOW):
            window = order[start : start + WINDOW]
            packed = pack_examples([len(self.examples[i][0]) for i in window], self.length)
            rows += [[window[i] for i in row] for row in packed]
        return [rows[i] for i in random_order(len(rows), "rows", self.seed, epoch).tolist()]

    def row(self, n: int) -> list[int]:
        """The examples of the n-th row of the run."""
        while self._starts[-1] <= n:
            self._starts.append(self._starts[-1] + len(self._rows(len(self._starts) - 1)))
        epoch = next(e for e in range(len(self._starts) - 1, -1, -1) if self._starts[e] <= n)
        return self._rows(epoch)[n - self._starts[epoch]]

    def batch(self, first: int, stop: int) -> Batch:
        """The run's rows from ``first`` to before ``stop``."""
        rows = (self.row(n) for n in range(first, stop))
        return collate(
            [packed_from_examples([self.examples[i] for i in row], self.length, self.pad_id) for row in rows]
        )
