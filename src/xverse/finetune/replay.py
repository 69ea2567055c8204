"""Replay: pretraining text among the fine-tuning examples, and whether any language was forgotten.

Training on a few languages raises the loss on all others; mixing in some of the text of pretraining prevents
most of that (Scialom, Chakrabarty and Muresan 2022, arXiv:2205.12393; Ibrahim et al. 2024, arXiv:2403.08763).
The languages get equal shares, and those with less text than their share all of it.
"""

from __future__ import annotations

import bisect
import hashlib
import heapq
import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import TrainerCallback

from xverse.config import UserError
from xverse.data.dialogues.formats import DatasetInfo, Skip, to_text
from xverse.data.feed import token_byte_lengths
from xverse.data.order import random_order
from xverse.data.shards import Shard, StoredArray
from xverse.files import write_text
from xverse.finetune.encode import Data, Example
from xverse.finetune.settings import DatasetUse, Settings
from xverse.finetune.sources import Source, read_file, source_files
from xverse.log import notice
from xverse.tokenizer import Tokenizer

FORGOTTEN = 1.10  # a language whose bits per byte grow by more than this factor is reported
FILE = "languages.json"
WINDOWS = 2**20  # windows of a language that are permuted one by one; more are permuted in runs
KEPT_BYTES = 4  # bytes of text files kept per token wanted, from which the tokens are drawn
LEAST_BYTES = 2**20


Numbers = NDArray[Any] | StoredArray


@dataclass
class _Text:
    """Tokens of one language, in pieces: arrays of tokens with the offsets of their documents."""

    pieces: list[tuple[Numbers, Numbers]] = field(default_factory=list)

    def examples(self, language: str, length: int, seed: int) -> Iterator[Example]:
        """All text once, in windows of at most ``length`` tokens of one document, in an order by ``seed``."""
        counts = [-(-len(tokens) // length) for tokens, _ in self.pieces]
        starts = np.cumsum([0, *counts])
        run = -(-int(starts[-1]) // WINDOWS)
        for first in random_order(-(-int(starts[-1]) // run), "replay", language, seed) if run else ():
            for window in range(int(first) * run, min((int(first) + 1) * run, int(starts[-1]))):
                piece = int(np.searchsorted(starts, window, side="right")) - 1
                yield from self._window(piece, window - int(starts[piece]), length, language)

    def _window(self, piece: int, number: int, length: int, language: str) -> Iterator[Example]:
        tokens, offsets = self.pieces[piece]
        start, stop = number * length, min((number + 1) * length, len(tokens))
        low, high = (bisect.bisect_right(offsets, edge) for edge in (start, stop))
        edges = [start, *(int(edge) for edge in offsets[low:high] if start < edge < stop), stop]
        for begin, end in itertools.pairwise(edges):
            if end - begin > 1:
                ids = tokens[begin:end].tolist()
                yield Example(ids, [False] + [True] * (len(ids) - 1), f"replay/{language}[{piece}+{begin}]")


def add_replay(data: Data, settings: Settings, tokenizer: Tokenizer, length: int) -> None:
    """Append the replayed text to ``data.train`` and set ``data.languages``, the held-out text of each.

    Raises UserError if there is no text or if it was encoded with another tokenizer.
    """
    replay = settings.replay
    assert replay is not None
    dialogue_tokens = sum(len(example.ids) for example in data.train)
    wanted = math.ceil(dialogue_tokens * replay.share / (1 - replay.share))
    if (replay.data / "train").is_dir():
        texts = _read_shards(replay.data / "train", tokenizer)
        held_out = _read_shards(replay.data / "valid", tokenizer)
    else:
        texts, held_out = _read_texts(replay.data, tokenizer, wanted + replay.eval_tokens, settings.seed), {}
    streams = {name: text.examples(name, length, settings.seed) for name, text in sorted(texts.items())}
    for name, stream in streams.items():
        own = held_out[name].examples(name, length, settings.seed) if name in held_out else stream
        data.languages += _take(own, replay.eval_tokens)
    drawn = _draw(streams, wanted)
    tokens = sum(len(example.ids) for example in drawn)
    note = f"replay: {tokens} tokens of {replay.data} in {len(streams)} languages"
    if replay.share:
        reached = tokens / max(1, tokens + dialogue_tokens)
        note += f", {reached:.1%} of the training tokens"
        if tokens < wanted:
            note += f" (share {replay.share:g} needs {wanted}; there is no more text)"
    data.train += drawn
    data.notes.append(note)


def _take(stream: Iterator[Example], tokens: int) -> list[Example]:
    """Examples of at least so many tokens, or all."""
    taken: list[Example] = []
    while tokens > 0 and (example := next(stream, None)) is not None:
        taken.append(example)
        tokens -= len(example.ids)
    return taken


def _draw(streams: Mapping[str, Iterator[Example]], wanted: int) -> list[Example]:
    """Examples of ``wanted`` tokens, always from the language that has contributed the fewest."""
    drawn: list[Example] = []
    heap = [(0, name) for name in sorted(streams)]
    while heap and wanted > 0:
        taken, name = heapq.heappop(heap)
        example = next(streams[name], None)
        if example is None:
            continue
        drawn.append(example)
        wanted -= len(example.ids)
        heapq.heappush(heap, (taken + len(example.ids), name))
    return drawn


def _read_shards(folder: Path, tokenizer: Tokenizer) -> dict[str, _Text]:
    """The token shards of ``xverse data prepare``, by language."""
    texts: dict[str, _Text] = defaultdict(_Text)
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in paths:
        if not path.is_dir() or path.name.startswith("."):
            continue
        shard = Shard.open(path)
        if shard.header.tokenizer != tokenizer.hash:
            raise UserError(
                f"replay: {path} was encoded with another tokenizer than the model's; prepare the texts "
                "with the model's, or give their folder"
            )
        texts[shard.header.language or path.name].pieces.append((shard.tokens, shard.offsets))
    if folder.name == "train" and not texts:
        raise UserError(f"replay: {folder}: no token shard here; run xverse data prepare first")
    return texts


def _read_texts(path: Path, tokenizer: Tokenizer, tokens: int, seed: int) -> dict[str, _Text]:
    """A random part of the texts in a file or folder, enough for ``tokens`` of each language, encoded.

    The language of a text is its ``lang`` or ``language``, or the name of its file.
    """
    if not path.exists():
        raise UserError(f"replay: {path}: no such file or folder")
    limit = max(LEAST_BYTES, KEPT_BYTES * tokens)
    kept: dict[str, list[tuple[int, str]]] = defaultdict(list)  # heaps: the largest key is dropped first
    sizes: Counter[str] = Counter()
    source = Source(DatasetUse(name=str(path)), DatasetInfo(), path, guessed=True)
    for file in source_files(source):
        for number, (item, info) in enumerate(read_file(file, "pt", Counter())):
            try:
                text = to_text(item, info)
            except Skip:
                continue
            named = [item.get(key) for key in ("lang", "language")]
            language = next((name for name in named if isinstance(name, str) and name), None)
            language = language or file.path.name.partition(".")[0]
            digest = hashlib.blake2b(f"{seed}\x1f{file.name}\x1f{number}".encode(), digest_size=7).digest()
            heapq.heappush(kept[language], (-int.from_bytes(digest, "big"), text))
            sizes[language] += len(text.encode())
            while sizes[language] > limit and len(kept[language]) > 1:
                sizes[language] -= len(heapq.heappop(kept[language])[1].encode())
    if not kept:
        raise UserError(f"replay: {path} has no text")
    texts = {}
    for language, items in kept.items():
        ids, lengths = tokenizer.encode_flat([text for _, text in sorted(items)], tokenizer.eos_id)
        texts[language] = _Text([(ids, np.cumsum([0, *lengths]))])
    return texts


class Languages(TrainerCallback):
    """Measures the bits per byte of each language's held-out text before training, for a comparison after it.

    The figures before are saved in the run's folder, so that a resumed run compares with its base as well.
    """

    def __init__(self, trainer: Any, examples: list[Example], tokenizer: Tokenizer, folder: Path) -> None:
        self.trainer, self.examples, self.file = trainer, examples, folder / FILE
        sizes = token_byte_lengths(tokenizer)
        self.bytes: Counter[str] = Counter()
        for example in examples:
            self.bytes[example.dataset] += int(sizes[example.ids[1:]].sum())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._write({"before": self._measure()})

    def compare(self) -> dict[str, dict[str, float]]:
        """Bits per byte ``before`` (without a file of the start: empty) and ``after``, reported."""
        figures = {"before": {}, **(json.loads(self.file.read_text()) if self.file.is_file() else {})}
        figures["after"] = self._measure()
        self._write(figures)
        if self.trainer.is_world_process_zero():
            report(figures["before"], figures["after"])
        return figures

    def _measure(self) -> dict[str, float]:
        nats = self.trainer.held_out_nats(self.examples)
        return {
            name.removeprefix("replay/"): total / math.log(2) / self.bytes[name]
            for name, total in nats.items()
            if self.bytes[name]
        }

    def _write(self, figures: Mapping[str, Any]) -> None:
        if self.trainer.is_world_process_zero():
            write_text(self.file, json.dumps(figures, indent=1, ensure_ascii=False))


def report(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    """Log each language's bits per byte, and name those that rose by more than a tenth."""
    pairs = [
        f"{name} {before[name]:.3f} → {value:.3f}" if name in before else f"{name} {value:.3f}"
        for name, value in after.items()
    ]
    if pairs:
        notice(f"bits per byte of held-out text: {', '.join(pairs)}")
    risen = forgotten(before, after)
    if risen:
        rises = ", ".join(f"{name} ({rise:+.0%})" for name, rise in risen.items())
        notice(
            f"bits per byte rose by more than {FORGOTTEN - 1:.0%}: {rises}; a larger replay.share keeps more"
        )


def forgotten(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """The relative rise of each language whose bits per byte rose by more than a tenth, largest first."""
    rises = {name: after[name] / value - 1 for name, value in before.items() if name in after}
    return {
        name: rise for name, rise in sorted(rises.items(), key=lambda item: -item[1]) if rise > FORGOTTEN - 1
    }
