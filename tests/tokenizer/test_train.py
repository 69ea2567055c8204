"""Training: exact size, determinism, compact white space, and what the alphabet keeps."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

from xverse.config import UserError
from xverse.tokenizer import Tokenizer, train_tokenizer
from xverse.tokenizer.train import choose_alphabet

CODE = "def f(x):\n    if x:\n        return x\n    return None\n\n\n"


def test_exact_size_and_same_result_in_another_process(tiny_texts: list[str]) -> None:
    here = train_tokenizer(tiny_texts, 620, limit_alphabet=200)
    assert here.vocab_size == 620
    program = (
        "import sys; from xverse.tokenizer import train_tokenizer\n"
        "print(train_tokenizer(sys.stdin.read().splitlines(), 620, limit_alphabet=200).hash)"
    )
    there = subprocess.run(
        [sys.executable, "-c", program],
        input="\n".join(tiny_texts),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
        env={"PYTHONUTF8": "1", "PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
    )
    assert there.stdout.strip() == here.hash


def test_corpus_too_small_names_what_it_gave() -> None:
    with pytest.raises(UserError, match=r"too small: it gives 26\d entries .* not 900"):
        train_tokenizer(["abc"], 900)
    with pytest.raises(UserError, match="too small"):
        train_tokenizer([], 900)
    with pytest.raises(UserError, match="no room for merges"):
        train_tokenizer(["abc"], 200)


def test_indentation_and_line_ends_are_compact() -> None:
    tokenizer = train_tokenizer([CODE * 4], 298, limit_alphabet=20)
    shown = [tokenizer.decode([index]) for index in tokenizer.encode("    if x:\n        return x\n\n\n")]
    assert shown == ["   ", " if", " x", ":", "\n", "       ", " return", " x", "\n\n\n"]


def test_alphabet_by_frequency_with_ties_by_code_point() -> None:
    # The space, written ▁, comes before c and d by code point; a literal ▁ is never in the alphabet.
    assert choose_alphabet(Counter("bbaa ▁▁▁cd"), 3) == ["a", "b", "▁"]
    # More than the limit, but asked for by name.
    assert choose_alphabet(Counter("bbaa c"), 2, initial="z龘") == ["z", "▁", "龘"]


def test_rare_characters_are_bytes_and_never_bridged() -> None:
    texts = ["a龘b " * 50 + "aa bb " * 100]
    tokenizer: Tokenizer = train_tokenizer(texts, 264, limit_alphabet=3, min_frequency=1)
    vocab = tokenizer.backend.get_vocab()
    assert "龘" not in vocab
    assert "ab" not in vocab  # never adjacent in the text
    assert tokenizer.decode(tokenizer.encode("a龘b")) == "a龘b"


def test_lone_surrogates_in_the_corpus_do_not_stop_training(tiny_texts: list[str]) -> None:
    assert train_tokenizer([*tiny_texts, "x\ud83d"], 480).vocab_size == 480
