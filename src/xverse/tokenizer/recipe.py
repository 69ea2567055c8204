"""Train a tokenizer of XVERSE's structure from a recipe, in bounded memory: counted words to merges
(csrc/bpe.cpp).

A language's part of the vocabulary depends on the weight of its words. ``temperature`` makes a language's
share (its share of the texts) ** temperature, times ``shares[language]``: 1 keeps the texts' proportions, 0
makes languages equal in characters. ``rounds`` then balances by need: after each training the weights become
shares / (tokens of the language's texts), which minimises the sum of shares × log(tokens).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xverse.config import UserError, nearest
from xverse.files import alone, write_json
from xverse.hardware import cores
from xverse.log import notice
from xverse.texts import ReadReport, find_files, read_json, read_texts, stem
from xverse.tokenizer import native
from xverse.tokenizer.counting import WordCounts, count_words, remove_counts
from xverse.tokenizer.tokenizer import SPACE, Tokenizer
from xverse.tokenizer.train import FIXED, assemble, check_room, check_size, choose_alphabet, default_limit

INTERPRETER = 100 << 20  # bytes
SCALE = 1000  # the smallest weight as an integer, because counts are integers
SAMPLE = 400_000  # bytes of a language's texts that a round samples
SAMPLE_REACH = 64_000_000  # from the first so many


@dataclass(frozen=True)
class TokenizerRecipe:
    """``corpus``: a folder of {language}.jsonl(.gz) or .txt files, of which ``languages`` selects some.

    ``out`` receives the tokenizer and training.json. ``counts`` (default: counts/ in ``out``) keeps the words
    counted by language; a recipe with other weights may reuse the folder and starts with merging.
    """

    corpus: Path
    out: Path
    vocab_size: int = 100_534
    languages: list[str] = field(default_factory=list)  # empty: all
    temperature: float = 1.0
    shares: dict[str, float] = field(default_factory=dict)
    rounds: int = 0
    limit_alphabet: int | None = None  # maximum number of single characters; None: a third of the vocabulary
    character_coverage: float = 0.0  # of each language's characters, always single
    # Always single: assigned code points of ranges such as "4E00-9FFF".
    characters: list[str] = field(default_factory=list)
    initial_characters: str = ""
    min_frequency: int = 2
    max_token_length: int = 16
    memory_gb: float = 3.0
    threads: int | None = None
    counts: Path | None = None

    def __post_init__(self) -> None:
        for name, least, most in (
            ("temperature", 0, 1),
            ("rounds", 0, 20),
            ("character_coverage", 0, 1),
            ("memory_gb", 0.2, 1e5),
            ("min_frequency", 1, math.inf),
            ("max_token_length", 3, 2048),
            ("vocab_size", 1, 1 << 24),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name} must be between {least} and {most}, not {value}")
        if self.limit_alphabet is not None and self.limit_alphabet < 0:
            raise ValueError(f"limit_alphabet {self.limit_alphabet}: must not be negative")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, not {self.threads}")
        if wrong := [name for name, share in self.shares.items() if not share > 0]:
            raise ValueError(
                f"shares: '{wrong[0]}' must be above 0; to exclude a language, list the others in languages"
            )


@dataclass
class CountedLanguage:
    """A language's counted words."""

    language: str
    files: list[Path]
    counts: WordCounts
    characters: np.ndarray  # int64 [0x110000]


def train_recipe(recipe: TokenizerRecipe) -> dict[str, Any]:
    """Train, write ``recipe.out`` and return the contents of its training.json.

    Started again, a killed run counts only what is missing, and a complete one does nothing. Raises UserError
    for a problem of the recipe or its texts, and if ``out`` holds another recipe's tokenizer or is in use.
    """
    native.require()
    files = _files_by_language(recipe)
    digest = _digest(recipe, files)
    with alone(recipe.out / ".lock", f"{recipe.out}: another xverse tokenizer train is using this folder"):
        return _train(recipe, files, digest)


def _train(recipe: TokenizerRecipe, files: Mapping[str, list[Path]], digest: str) -> dict[str, Any]:
    record = recipe.out / "training.json"
    if record.exists():
        return _finished(record, digest)
    if (recipe.out / "tokenizer.json").exists():
        raise UserError(f"{recipe.out}: holds a tokenizer of another recipe; name another folder")
    start = time.perf_counter()
    threads, memory = _resources(recipe)
    sources = _counted(recipe, files, memory // 2, threads)
    counted = time.perf_counter() - start
    weights = first_weights(recipe, sources)
    for number in range(recipe.rounds + 1):
        tokenizer, figures = train_words(recipe, sources, weights, memory, threads)
        if number < recipe.rounds:
            tokens = {source.language: _tokens(tokenizer, source) for source in sources}
            weights = {name: recipe.shares.get(name, 1.0) / tokens[name] for name in tokens}
            notice(f"round {number + 1} of {recipe.rounds}: weights by need")
    total = sum(weights[source.language] * source.counts.occurrences for source in sources)
    report = {
        "digest": digest,
        "hash": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
        **figures,
        "count_s": round(counted, 2),
        "train_s": round(time.perf_counter() - start - counted, 2),
        "languages": {
            source.language: {
                "texts": source.counts.texts,
                "bytes": source.counts.bytes,
                "different_words": source.counts.different,
                "weight": weights[source.language] * source.counts.occurrences / total,
                "single_characters": _coverage(source, tokenizer),
            }
            for source in sources
        },
    }
    tokenizer.save(recipe.out)
    write_json(record, report)
    return report


def _counted(
    recipe: TokenizerRecipe, files: Mapping[str, list[Path]], memory: int, threads: int
) -> list[CountedLanguage]:
    folder = recipe.counts or recipe.out / "counts"
    sources = []
    with alone(
        folder / ".lock", f"{folder}: another xverse tokenizer train is counting words in this folder"
    ):
        for number, (language, paths) in enumerate(files.items(), 1):
            counts = count_words(paths, folder / language, memory=memory, threads=threads)
            shown = f"{counts.different:,} distinct words of {counts.occurrences:,}"
            notice(f"{number}/{len(files)} {language}: {shown}")
            sources.append(
                CountedLanguage(language, paths, counts, native.count_characters([counts.path], [1]))
            )
    return sources


def train_files(
    recipe: TokenizerRecipe, files: Sequence[Path], counts: Path
) -> tuple[Tokenizer, dict[str, Any]]:
    """Train on files regardless of language, counting their words into the folder ``counts``.

    Finished counts stay there if the run is killed or the disk is full.
    """
    threads, memory = _resources(recipe)
    words = count_words(files, counts, memory=memory // 2, threads=threads)
    source = CountedLanguage("all", list(files), words, native.count_characters([words.path], [1]))
    try:
        result = train_words(recipe, [source], {"all": 1.0}, memory, threads)
    except UserError:
        remove_counts(counts)
        raise
    return result


def _resources(recipe: TokenizerRecipe) -> tuple[int, int]:
    """Number of threads, and bytes of memory besides the interpreter."""
    return recipe.threads or cores().usable, int(recipe.memory_gb * 1e9) - INTERPRETER


def train_words(
    recipe: TokenizerRecipe,
    sources: Sequence[CountedLanguage],
    weights: Mapping[str, float],
    memory: int,
    threads: int,
) -> tuple[Tokenizer, dict[str, Any]]:
    """Train on counted words, each language's multiplied by its weight; also returns figures of the
    training."""
    least, most = min(weights.values()), max(weights.values())
    scale = (1 if least == most else SCALE) / least
    multipliers = [max(1, round(weights[source.language] * scale)) for source in sources]
    characters = np.zeros_like(sources[0].characters)
    for source, multiplier in zip(sources, multipliers, strict=True):
        characters += source.characters * multiplier
    counts = {chr(point): int(characters[point]) for point in np.flatnonzero(characters)}
    always = _always(recipe, sources)
    alphabet = choose_alphabet(counts, default_limit(recipe.vocab_size, recipe.limit_alphabet), always)
    check_room(recipe.vocab_size, alphabet)
    ids, last, figures = native.train(
        [source.counts.path for source in sources],
        multipliers,
        alphabet,
        first_id=FIXED,
        vocab_size=recipe.vocab_size,
        min_frequency=recipe.min_frequency,
        max_token_length=recipe.max_token_length,
        memory=memory,
        threads=threads,
    )
    merges = merge_texts(ids, alphabet)
    check_size(recipe.vocab_size, alphabet, merges, recipe.min_frequency)
    shown: dict[str, Any] = {"characters": len(alphabet), "merges": len(merges), "words": figures["words"]}
    shown |= {"phases": figures["phases"], "last_count": round(int(last[-1]) / min(multipliers), 2)}
    return assemble(alphabet, merges), shown


def merge_texts(ids: np.ndarray, alphabet: Sequence[str]) -> list[tuple[str, str]]:
    """Merges as pairs of texts, from ids uint32 [N, 3] (left, right, result)."""
    tokens = [""] * FIXED + list(alphabet)
    pairs = []
    for left, right, made in ids.tolist():
        assert made == len(tokens)
        pairs.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
    return pairs


def first_weights(recipe: TokenizerRecipe, sources: Sequence[CountedLanguage]) -> dict[str, float]:
    """The weight of each language's counts, from ``temperature`` and ``shares``."""
    sizes = {source.language: int(source.characters.sum()) for source in sources}
    return {
        name: recipe.shares.get(name, 1.0) * size ** (recipe.temperature - 1) for name, size in sizes.items()
    }


def _files_by_language(recipe: TokenizerRecipe) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for path in find_files([recipe.corpus]):
        files.setdefault(stem(path), []).append(path)
    for name in [*recipe.languages, *recipe.shares]:
        if name not in files:
            raise UserError(f"{recipe.corpus}: no texts of '{name}'{nearest(name, files)}")
    if recipe.languages:
        files = {name: files[name] for name in sorted(set(recipe.languages))}
    for name in recipe.shares:
        if name not in files:
            raise UserError(f"shares: '{name}' is not among languages")
    for name, paths in files.items():
        if not any(path.stat().st_size for path in paths):
            raise UserError(f"{paths[0]}: is empty; '{name}' has no text (select others with languages)")
    return files


def _always(recipe: TokenizerRecipe, sources: Sequence[CountedLanguage]) -> set[str]:
    """The characters that the recipe requires: listed, in ranges, and by each language's coverage."""
    always = set(recipe.initial_characters)
    for text in recipe.characters:
        always |= set(_range(text))
    for source in sources if recipe.character_coverage else ():
        points = np.flatnonzero(source.characters)
        counts = source.characters[points]
        order = np.lexsort((points, -counts))
        covered = np.cumsum(counts[order]) - counts[order]  # before each
        needed = points[order[covered < recipe.character_coverage * counts.sum()]]
        always |= {chr(point) for point in needed}
    return always - {SPACE}


def _range(text: str) -> list[str]:
    first, dash, last = text.partition("-")
    try:
        begin, end = int(first, 16), int(last if dash else first, 16)
        if not 0 <= begin <= end <= 0x10FFFF:
            raise ValueError
    except ValueError:
        raise UserError(
            f"characters: expected a range of code points such as 4E00-9FFF, found '{text}'"
        ) from None
    # Without unassigned, private and surrogate code points.
    points = map(chr, range(begin, end + 1))
    return [point for point in points if unicodedata.category(point) not in ("Cn", "Co", "Cs")]


def _tokens(tokenizer: Tokenizer, source: CountedLanguage) -> float:
    """The approximate number of tokens of a language's texts, from a sample of the beginnings of its
    files."""
    reach = SAMPLE_REACH // len(source.files)
    share = min(1.0, SAMPLE / min(max(source.counts.bytes, 1), SAMPLE_REACH))
    texts: list[str] = []
    used = 0
    for path in source.files:
        seen = taken = 0
        for text in read_texts(path, ReadReport()):
            if taken <= seen * share:
                taken += len(text)
                texts.append(text.decode())
            seen += len(text)
            if seen > reach:
                break
        used += taken
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    return max(tokens, 1) * source.counts.bytes / max(used, 1)


def _coverage(source: CountedLanguage, tokenizer: Tokenizer) -> float:
    """The share of a language's characters without byte fallback."""
    vocab = tokenizer.values["model"]["vocab"]
    single = [
        point for point in np.flatnonzero(source.characters) if chr(point) in vocab or chr(point) == " "
    ]
    return round(float(source.characters[single].sum() / source.characters.sum()), 6)


def _digest(recipe: TokenizerRecipe, files: Mapping[str, Sequence[Path]]) -> str:
    settings = dataclasses.asdict(recipe)
    for name in ("corpus", "out", "counts", "memory_gb", "threads"):  # they do not affect the tokenizer
        del settings[name]
    sizes = {name: [path.stat().st_size for path in paths] for name, paths in files.items()}
    return hashlib.sha256(json.dumps([settings, sizes], sort_keys=True).encode()).hexdigest()


def _finished(record: Path, digest: str) -> dict[str, Any]:
    report: dict[str, Any] = read_json(record)
    if report.get("digest") != digest:
        raise UserError(f"{record.parent}: holds a tokenizer of other settings or texts; name another folder")
    notice(f"{record.parent}: complete, nothing to do")
    return report
