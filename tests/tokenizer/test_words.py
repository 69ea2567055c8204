"""The compiled pre-tokenizer against the library's, on any text."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from tests.pre_tokens import pre_tokens
from tests.scale import examples
from xverse.tokenizer import native
from xverse.tokenizer.train import TRAINING_WORDS

pytestmark = pytest.mark.skipif(native.library() is None, reason="the compiled part was not built")

LIBRARY = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(TRAINING_WORDS), "isolated"),
        pre_tokenizers.Split("▁", "removed"),
        pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Punctuation("isolated"),
    ]
)
ODD = " \t\r\n▁.,!?'\"()0159²½Ⅷ٣๓零、。「」aé龘ก्ि́­​\u3000\xa0\u2028\x00\x85😀\U0010ffff"


def by_library(text: str) -> list[str]:
    return [word.replace("▁", " ") for word, _ in LIBRARY.pre_tokenize_str(text)]


@given(st.text(st.one_of(st.sampled_from(ODD), st.characters(exclude_categories=["Cs"])), max_size=60))
@settings(max_examples=examples(500), deadline=None)
def test_any_text(text: str) -> None:
    assert pre_tokens(text) == by_library(text)


def test_every_code_point_stands_alone_as_in_the_library() -> None:
    """csrc/isolated.h; where the library has moved to another Unicode, the ranges are shown."""
    alone = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation("isolated")]
    )
    ranges: list[list[int]] = []
    for begin in range(0, 0x110000, 4096):
        points = [
            point for point in range(begin, begin + 4096) if not 0xD800 <= point < 0xE000 and point != 0x2581
        ]
        text = "".join(f"a{chr(point)}a" for point in points)
        pieces = {
            start // 3
            for _, (start, end) in alone.pre_tokenize_str(text)
            if start % 3 == 1 and end == start + 1
        }
        for index in sorted(pieces):
            if ranges and ranges[-1][1] == points[index] - 1:
                ranges[-1][1] = points[index]
            else:
                ranges.append([points[index]] * 2)
        white = str.maketrans(" \t\r\n", "bbbb")
        expected = [word for word, _ in alone.pre_tokenize_str(text.translate(white))]
        assert pre_tokens(text.translate(white)) == expected, ranges


@pytest.mark.data
def test_real_texts_of_every_language(test_data: Path) -> None:
    files = sorted((test_data / "corpus").glob("*.jsonl.gz"))
    assert len(files) >= 41
    for path in files:
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            for line in islice(stream, 0, 200, 50):
                text = json.loads(line)["text"]
                assert pre_tokens(text) == by_library(text), path
