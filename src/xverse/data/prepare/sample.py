"""The tokenizer of a run: trained on a sample of every source, in bounded memory, or copied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xverse.config import UserError
from xverse.data.prepare.clean import DocumentWriter, read_cleaned
from xverse.data.prepare.encode import Cleaned
from xverse.data.prepare.plan import SplitPlan
from xverse.data.prepare.readers import Document
from xverse.files import atomic_directory
from xverse.log import notice
from xverse.tokenizer import Tokenizer, native
from xverse.tokenizer.general import load_tokenizer_of
from xverse.tokenizer.recipe import TokenizerRecipe, train_files
from xverse.tokenizer.train import train_tokenizer

PIECES = 16  # of a source's limit, at least, so that some of every source are drawn
MEMORY_GB = 1.0  # for counting words and learning merges


@dataclass
class SampleLimits:
    """Bytes of text of each source: ``all``, or ``sources`` by name."""

    all: int
    sources: dict[str, int]

    def of(self, name: str) -> int:
        return self.sources.get(name, self.all)


@dataclass
class Sample:
    """Draws text for the tokenizer from the groups of a rank: ``WORK/sample/GROUP.jsonl.zst``.

    Of every source, pieces of documents are chosen by hash, so that they make about its limit.
    """

    work: Path
    limits: SampleLimits
    groups: int

    def __call__(self, data: Any, rank: int, tasks: int) -> None:
        plan = SplitPlan.load(self.work / "plan.json")
        valid = {name: frozenset(source.valid) for name, source in plan.sources.items()}
        shares = {
            name: min(1.0, self.limits.of(name) / source.text_bytes) for name, source in plan.sources.items()
        }
        cleaned = Cleaned(self.work)
        for group in range(rank, self.groups, tasks):
            path = self.work / "sample" / f"{group:05d}.jsonl.zst"
            if path.exists():
                continue
            with DocumentWriter(path) as writer:
                for row, key, fate in cleaned.documents(group):
                    name = row["name"]
                    if fate or key in valid[name]:
                        continue
                    for number, piece in enumerate(cut(row["text"], piece_bytes(self.limits.of(name)))):
                        if draw(key, number) < shares[name]:
                            writer.add(Document(piece, row["lang"]), name, "")


def piece_bytes(limit: int) -> int:
    """The largest piece of a document that is drawn as a whole."""
    return max(256, min(1 << 16, limit // PIECES))


def cut(text: str, size: int) -> Iterator[str]:
    """A text in pieces of about ``size`` bytes, cut at line ends or spaces where there are any."""
    if len(text) <= size // 4 or len(text.encode()) <= size:
        yield text
        return
    step = max(1, size * len(text) // len(text.encode()))  # characters
    start = 0
    while start < len(text):
        end = start + step
        if end < len(text):
            for mark in ("\n", " "):
                found = text.rfind(mark, start + step // 2, end)
                if found >= 0:
                    end = found + 1
                    break
        yield text[start:end]
        start = end


def draw(key: int, number: int) -> float:
    """A number from 0 to 1 for a piece of the document with the hash ``key``."""
    # Low bits, because the high bits decide which documents are held out. The first piece has the document's.
    return ((key + number * 0x9E3779B1) & 0xFFFFFFFF) / 2**32


@dataclass
class MakeTokenizer:
    """Makes ``OUT/tokenizer``: trains it on the sample, or copies ``given``."""

    out: Path
    given: Path | None
    vocab_size: int
    limit_alphabet: int | None
    limits: SampleLimits
    groups: int

    def __call__(self, data: Any, rank: int, tasks: int) -> None:
        folder = self.out / "tokenizer"
        if folder.exists():
            return
        tokenizer = load_tokenizer_of(self.given) if self.given is not None else self._train()
        with atomic_directory(folder) as temporary:
            tokenizer.save(temporary)

    def _train(self) -> Tokenizer:
        work = self.out / "work"
        plan = SplitPlan.load(work / "plan.json")
        files = [work / "sample" / f"{group:05d}.jsonl.zst" for group in range(self.groups)]
        sizes = dict.fromkeys(plan.sources, 0)
        if absent := sorted(self.limits.sources.keys() - sizes):
            notice(f"tokenizer_sample_overrides: the text has no source {', '.join(absent)}")
        for file in files:
            for row in read_cleaned(file):
                sizes[row["name"]] += len(row["text"].encode())
        for name, size in sizes.items():
            if not size:
                limit = self.limits.of(name)
                notice(f"{name}: nothing of it is in the tokenizer's sample; raise its limit (now {limit})")
        if not any(sizes.values()):
            raise UserError("the tokenizer's sample is empty; raise tokenizer_sample_bytes")
        try:
            if native.library() is not None:
                recipe = TokenizerRecipe(
                    work,
                    work,
                    vocab_size=self.vocab_size,
                    limit_alphabet=self.limit_alphabet,
                    memory_gb=MEMORY_GB,
                )
                return train_files(recipe, [file for file in files if file.stat().st_size], work / "words")[0]
            texts = (row["text"] for file in files for row in read_cleaned(file))
            return train_tokenizer(texts, self.vocab_size, limit_alphabet=self.limit_alphabet)
        except UserError as error:
            used, there = sum(sizes.values()), sum(source.text_bytes for source in plan.sources.values())
            limited = any(self.limits.of(name) < source.text_bytes for name, source in plan.sources.items())
            if "too small" not in str(error) or not limited:
                raise
            raise UserError(
                f"the tokenizer's sample of {used:,} bytes, of {there:,} in the corpus, is too small for a "
                f"vocabulary of {self.vocab_size:,}; raise tokenizer_sample_bytes or lower vocab_size"
            ) from None
