"""Generate text of any size in many languages, with a realistic vocabulary, from a real corpus.

For each language, a list of its real words by frequency, followed by words from a character model (the next
character given the previous two), is sampled by Zipf's law, so that new words keep appearing. One byte in
twenty comes from the real texts.
"""

from __future__ import annotations

import multiprocessing
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np

from xverse.config import UserError
from xverse.hardware import cores
from xverse.texts import ReadReport, find_files, read_texts, stem
from xverse.tokenizer import native

REAL_BYTES = 4_000_000  # read of each language's corpus
WORDS_PER_MB = 5600  # distinct words in a language's list per generated MB
LONGEST = 16  # characters of a generated word
CHUNK = 100_000  # words
SPACED = [b" ", b", ", b". ", b"\n"]
UNSPACED = [b"", "，".encode(), "。".encode(), b"\n"]
_UNSPACED = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u4e00-\u9fff]")  # Thai, kana, ideographs
HOW_OFTEN = [43, 3, 3, 1]


class Concatenation:
    """Joins items chosen by index, far faster than ``bytes.join``; generates text for measurements."""

    def __init__(self, items: Sequence[bytes]) -> None:
        self._bytes = np.frombuffer(b"".join(items), dtype=np.uint8)
        self._starts = np.cumsum([0, *map(len, items)], dtype=np.int64)

    def join(self, chosen: np.ndarray) -> bytes:
        """The items with indices ``chosen``, int32 [N], concatenated."""
        room = int((self._starts[chosen + 1] - self._starts[chosen]).sum())
        target = np.empty(room, dtype=np.uint8)
        addresses = (array.ctypes.data for array in (self._bytes, self._starts, chosen))
        used = native.require().xvt_concatenate(*addresses, len(chosen), target.ctypes.data, room)
        assert used == room
        return target.tobytes()


def make_text(corpus: Path, folder: Path, size: int, seed: int = 0) -> list[Path]:
    """Write ``size`` bytes as {language}.txt, equally many for every language; returns the files.

    The same corpus, size and seed give the same bytes.
    """
    sources = find_files([corpus])
    folder.mkdir(parents=True, exist_ok=True)
    targets = [folder / f"{stem(source)}.txt" for source in sources]
    with ProcessPoolExecutor(cores().usable, mp_context=multiprocessing.get_context("spawn")) as pool:
        seeds = [[seed, number] for number in range(len(sources))]
        for _ in pool.map(_make_language, sources, targets, [size // len(sources)] * len(sources), seeds):
            pass
    return targets


def _make_language(source: Path, target: Path, size: int, seed: list[int]) -> None:
    generator = np.random.default_rng(seed)
    real = b"\n".join(_beginning(source))
    text = real.decode(errors="ignore")
    words = text.split()
    spaced = len(_UNSPACED.findall(text)) < 0.3 * len(text)
    if not spaced:
        cuts = np.cumsum(generator.integers(1, 5, len(text)))
        words = [word for a, b in pairwise(cuts.tolist()) if (word := text[a:b].strip())]
    if len(words) < 100:
        raise UserError(f"{source}: too little text to imitate")
    known = [word for word, _ in Counter(words).most_common()]
    target_size = max(2000, int(size / 1e6 * WORDS_PER_MB))
    vocabulary = dict.fromkeys(known[: target_size // 3])
    model = _character_model(known)
    before = 0
    while before + target_size // 100 < len(vocabulary) < target_size:  # a small corpus may not yield as many
        before = len(vocabulary)
        vocabulary.update(dict.fromkeys(_invent(model, target_size // 2, generator)))
    encoded = [word.encode() for word in list(vocabulary)[:target_size]]
    items = Concatenation([*encoded, *(SPACED if spaced else UNSPACED)])
    endings = np.repeat(np.arange(4), HOW_OFTEN) + len(encoded)
    chosen = np.empty(2 * CHUNK, dtype=np.int32)
    written = taken = 0
    with target.open("wb") as stream:
        while written < size:
            chosen[0::2] = np.exp(generator.random(CHUNK) * np.log(len(encoded))) - 1
            chosen[1::2] = endings[generator.integers(0, len(endings), CHUNK)]
            chunk = items.join(chosen)
            piece = len(chunk) // 20
            begin = real.find(b"\n", taken % len(real)) + 1
            chunk += b"\n" + real[begin : real.find(b"\n", begin + piece) + 1 or len(real)]
            taken += piece
            chunk = chunk[: size - written]
            if written + len(chunk) >= size:  # end with a complete line
                chunk = chunk[: chunk.rfind(b"\n") + 1] or chunk
                written = size
            stream.write(chunk)
            written += len(chunk)


def _beginning(source: Path) -> Iterator[bytes]:
    size = 0
    for text in read_texts(source, ReadReport()):
        yield text
        size += len(text)
        if size > REAL_BYTES:
            return


def _character_model(words: list[str]) -> tuple[np.ndarray, ...]:
    """What follows each pair of characters (a state) in ``words``.

    Returns int64 arrays: per state, the index of its first continuation and their number; per continuation,
    its character and next state; and the initial state.
    """
    flat = np.frombuffer("".join(f"\1\1{word}\0" for word in words).encode("utf-32-le"), np.uint32)
    flat = flat.astype(np.int64)
    positions = np.flatnonzero(flat != 1)  # characters and word ends, which can follow a state
    contexts = flat[positions - 2] << 21 | flat[positions - 1]
    order = np.argsort(contexts, kind="stable")
    states, first, counts = np.unique(contexts[order], return_index=True, return_counts=True)
    following = positions[order]
    characters = flat[following]
    after = np.searchsorted(states, flat[following - 1] << 21 | characters)  # unused after a word end
    return first, counts, characters, after, np.searchsorted(states, [1 << 21 | 1])


def _invent(model: tuple[np.ndarray, ...], count: int, generator: np.random.Generator) -> list[str]:
    """``count`` words sampled from the model, all extended together, character by character."""
    first, counts, characters, after, beginning = model
    state = np.repeat(beginning, count)
    grown = np.zeros((count, LONGEST), dtype=np.uint32)
    alive = np.arange(count)
    for column in range(LONGEST):
        here = state[alive]
        chosen = first[here] + (generator.random(len(alive)) * counts[here]).astype(np.int64)
        grown[alive, column] = characters[chosen]
        state[alive] = after[chosen]
        alive = alive[characters[chosen] != 0]
    return [word for word in grown.view(f"<U{LONGEST}")[:, 0].tolist() if word]


def prefix(files: list[Path], folder: Path, size: int) -> list[Path]:
    """Write the beginnings of ``files``, ``size`` bytes in all and cut at line ends, to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for path in files:
        with path.open("rb") as stream:
            data = stream.read(size // len(files))
        target = folder / path.name
        target.write_bytes(data[: data.rfind(b"\n") + 1] or data)
        made.append(target)
    return made
