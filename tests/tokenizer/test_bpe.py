"""Merges over counted words against the library's trainer, ties and odd cases included."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.scale import examples
from xverse.config import UserError
from xverse.tokenizer import Tokenizer, native, train_tokenizer
from xverse.tokenizer.recipe import merge_texts
from xverse.tokenizer.train import FIXED, assemble, choose_alphabet, library_merges

pytestmark = pytest.mark.skipif(native.library() is None, reason="the compiled part was not built")
LARGE, SMALL = 1 << 28, 1  # bytes; the small one makes every phase as short as it can be


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("words")


def count(texts: Iterable[str], folder: Path) -> Path:
    counter = native.Counter(folder / "run", 1 << 20)
    counter.add([text.encode() for text in texts])
    _, long_words, runs = counter.finish()
    counter.close()
    assert long_words == 0
    native.merge_words([folder / f"run.{index}" for index in range(runs)], folder / "words")
    return folder / "words"


def ours(
    texts: list[str],
    folder: Path,
    vocab_size: int,
    limit: int,
    *,
    memory: int = LARGE,
    threads: int = 1,
    **options: int,
) -> Tokenizer:
    alphabet = choose_alphabet(Counter("".join(texts)), limit)
    settings = {"min_frequency": 2, "max_token_length": 16} | options
    ids, _, _ = native.train(
        [count(texts, folder)],
        [1],
        alphabet,
        first_id=FIXED,
        vocab_size=vocab_size,
        memory=memory,
        threads=threads,
        **settings,
    )
    return assemble(alphabet, merge_texts(ids, alphabet))


# Few letters and much repetition: ties, overlapping pairs ("aaa"), tokens that two ways of merging make.
@given(
    st.lists(st.text("ab 龘\n", min_size=1, max_size=30), min_size=1, max_size=12),
    st.integers(1, 40),
    st.sampled_from([(1, 16), (2, 16), (1, 4), (1, 3)]),
    st.sampled_from([LARGE, SMALL]),
    st.integers(2, 4),
)
@settings(max_examples=examples(150), deadline=None)
def test_small_alphabets(
    folder: Path, texts: list[str], merges: int, rule: tuple[int, int], memory: int, limit: int
) -> None:
    options = {"min_frequency": rule[0], "max_token_length": rule[1]}
    alphabet = choose_alphabet(Counter("".join(texts)), limit)
    size = FIXED + len(alphabet) + merges
    made = ours(texts, folder, size, limit, memory=memory, **options)
    if made.vocab_size < size:  # the corpus gives no more; the library stops at the same place
        with pytest.raises(UserError, match=f"gives {made.vocab_size} entries"):
            train_tokenizer(texts, size, limit_alphabet=limit, **options)
        size = made.vocab_size
        if size == FIXED + len(alphabet):
            return
    assert made.hash == train_tokenizer(texts, size, limit_alphabet=limit, **options).hash


# Runs of one letter, where pairs of equal tokens overlap; counts so far apart that one phase does not do.
RUNS = st.lists(st.tuples(st.sampled_from("aab"), st.integers(1, 17)), min_size=1, max_size=4)


@given(
    st.lists(st.tuples(RUNS, st.sampled_from([1, 2, 3, 7, 20, 60, 250])), min_size=1, max_size=7),
    st.integers(1, 25),
    st.sampled_from([(1, 16), (2, 16), (1, 64), (1, 8)]),
)
@example(
    [([("a", 17)], 250), ([("a", 7)], 7), ([("a", 5), ("b", 2)], 1), ([("b", 3), ("a", 3)], 1)], 20, (1, 64)
)
@settings(max_examples=examples(60), deadline=None)
def test_long_runs_in_short_phases(
    folder: Path, drawn: list[tuple[list[tuple[str, int]], int]], merges: int, rule: tuple[int, int]
) -> None:
    texts = [word for runs, times in drawn for word in ["".join(a * n for a, n in runs)] * times]
    alphabet = sorted({*"".join(texts), "▁"})
    size = FIXED + len(alphabet) + merges
    ids, counts, figures = native.train(
        [count(texts, folder)],
        [1],
        alphabet,
        first_id=FIXED,
        vocab_size=size,
        min_frequency=rule[0],
        max_token_length=rule[1],
        memory=SMALL,
        threads=1,
    )
    made = merge_texts(ids, alphabet)
    assert made == library_merges(texts, size, alphabet, (), min_frequency=rule[0], max_token_length=rule[1])
    assert len({left + right for left, right in made}) == len(made)  # why phases are exact: see csrc/bpe.cpp
    if len(counts) and counts[0] // 16 > counts[-1]:
        assert figures["phases"] > 1


def test_real_words_in_any_memory_and_threads(tiny_texts: list[str], folder: Path) -> None:
    sizes = {(memory, threads): ours(tiny_texts, folder, 620, 200, memory=memory, threads=threads).hash
             for memory in (LARGE, SMALL) for threads in (1, 2, 3)}  # fmt: skip
    assert set(sizes.values()) == {train_tokenizer(tiny_texts, 620, limit_alphabet=200).hash}


@pytest.mark.data
def test_five_scripts_in_phases(test_data: Path, folder: Path) -> None:
    import gzip
    import json

    texts = []
    for language in ("fi", "ja", "ta", "zh", "code_py"):
        with gzip.open(test_data / "corpus" / f"{language}.jsonl.gz", "rt", encoding="utf-8") as stream:
            texts += [json.loads(next(stream))["text"][:30_000] for _ in range(12)]
    expected = train_tokenizer(texts, 6000, limit_alphabet=1500).hash
    assert ours(texts, folder, 6000, 1500).hash == expected
    assert ours(texts, folder, 6000, 1500, memory=SMALL, threads=2).hash == expected


def test_ids_beyond_16_bits(folder: Path) -> None:
    """Symbols of 16 bits until ids need more, of 32 from the start where the alphabet is large: the same
    merges.
    """
    generator = random.Random(3)
    letters = [chr(0x4E00 + index) for index in range(200)]
    texts = ["".join(generator.choices(letters, k=8)) for _ in range(3000)] + ["ab cab " * 50]
    path = count(texts, folder)
    alphabet = choose_alphabet(Counter("".join(texts)), 1000)
    results = []
    for first in (FIXED, 65_000, 70_000):  # ids of alphabets of these sizes
        filler = [chr(0x20000 + index) for index in range(first - FIXED)]
        ids, counts, _ = native.train(
            [path],
            [1],
            [*filler, *alphabet],
            first_id=FIXED,
            vocab_size=first + len(alphabet) + 4000,
            min_frequency=1,
            max_token_length=16,
            memory=LARGE,
            threads=2,
        )
        results.append(((ids.astype(int) - first).tolist(), counts.tolist()))
    assert len(results[0][0]) >= 4000
    assert results[0] == results[1] == results[2]


def test_multipliers_and_large_counts(folder: Path) -> None:
    """Counts of several files add up, each times its multiplier, far beyond 32 bits."""
    first, second = folder / "first", folder / "second"
    count(["ab cd"], folder).rename(first)
    count(["ab ef"], folder).rename(second)
    multipliers = [10**15, 3]
    counts = native.count_characters([first, second], multipliers)
    assert counts[ord("a")] == 10**15 + 3
    alphabet = ["a", "b", "c", "d", "e", "f", "▁"]
    ids, counts, _ = native.train(
        [first, second],
        multipliers,
        alphabet,
        first_id=FIXED,
        vocab_size=FIXED + 7 + 2,
        min_frequency=1,
        max_token_length=16,
        memory=LARGE,
        threads=1,
    )
    assert merge_texts(ids, alphabet) == [("a", "b"), ("c", "d")]
    assert counts.tolist() == [10**15 + 3, 10**15]


def test_interrupting_is_not_lost(tiny_texts: list[str], folder: Path) -> None:
    def stop(merges: int, last: int) -> None:
        raise KeyboardInterrupt

    texts = [f"{a}{b}{c} " * 3 for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvw"]
    alphabet = choose_alphabet(Counter("".join(texts)), 100)
    with pytest.raises(KeyboardInterrupt):
        native.train(
            [count(texts, folder)],
            [1],
            alphabet,
            first_id=FIXED,
            vocab_size=FIXED + 1000,
            min_frequency=1,
            max_token_length=16,
            memory=LARGE,
            threads=1,
            report=stop,
        )


def test_a_broken_file_of_words_is_named(folder: Path) -> None:
    path = count(["some words of a text"], folder)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="not a file of counted words"):
        native.count_characters([path], [1])
    with pytest.raises(FileNotFoundError):
        native.merge_words([folder / "none"], folder / "out")
