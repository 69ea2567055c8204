"""The compiled encoder against the library, id for id."""

from __future__ import annotations

import copy
import gzip
import json
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scale import examples
from xverse.tokenizer import Tokenizer, native
from xverse.tokenizer.encoder import make_encoder

pytestmark = pytest.mark.skipif(native.library() is None, reason="the compiled part was not built")

ODD = " \t\r\n▁.,!?'\"()0159²½Ⅷ٣๓零、。「」aé龘ก्ि́­​\u3000\xa0\u2028\x00\x85😀\U0010ffff"
TEXTS = st.text(st.one_of(st.sampled_from(ODD), st.sampled_from("abcdefgh "), st.characters()), max_size=60)
NANO = Path(__file__).parents[2] / "src" / "xverse" / "assets" / "nano" / "tokenizer.json"


@pytest.fixture(scope="module")
def nano() -> Tokenizer:
    return Tokenizer.load(NANO)


@pytest.fixture(scope="module")
def published(nano: Tokenizer) -> Tokenizer:
    """The published structure: Metaspace parts the words, without rules for tabs and line ends."""
    values = copy.deepcopy(nano.values)
    values["pre_tokenizer"]["pretokenizers"] = [
        {"type": "Metaspace", "replacement": "▁", "add_prefix_space": False},
        *values["pre_tokenizer"]["pretokenizers"][2:],
    ]
    return Tokenizer(values)


def differing(tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    """The texts that are encoded otherwise than ``encode`` does, which asks the library."""
    assert make_encoder(tokenizer.values) is not None
    return [
        text
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True)
        if ids != tokenizer.encode(text)
    ]


@given(texts=st.lists(TEXTS, min_size=1, max_size=5))
@settings(max_examples=examples(400), deadline=None)
def test_any_text(nano: Tokenizer, published: Tokenizer, texts: list[str]) -> None:
    assert not differing(nano, texts)
    assert not differing(published, texts)


@pytest.mark.parametrize(
    "text", ["", " ", "  ", "  ▁", "▁▁ ▁", "a  ▁b", "  12", "\t\t a", "a \n b", "x" * 3_000]
)
def test_spaces_and_their_mark(nano: Tokenizer, published: Tokenizer, text: str) -> None:
    assert not differing(nano, [text])
    assert not differing(published, [text])


def test_what_stands_in_the_corpus(nano: Tokenizer, published: Tokenizer, test_data: Path) -> None:
    files = sorted((test_data / "corpus").glob("*.jsonl.gz"))
    assert len(files) > 40
    for path in files:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in islice(lines, 20)]
        assert not differing(nano, texts), path
        assert not differing(published, texts), path


def test_more_words_than_are_remembered(nano: Tokenizer) -> None:
    rng = random.Random(0)
    text = " ".join(f"{rng.choice('abcdefgh')}{rng.getrandbits(40):x}" for _ in range(400_000))
    ids, lengths = nano.encode_flat([text, "Hello", text[:1_000_000]])
    assert nano.decode(ids[: lengths[0]].tolist()) == text
    begin = int(lengths[0] + lengths[1])
    assert ids[begin:-4].tolist() == ids[: len(ids) - begin - 4].tolist()
    assert ids[lengths[0] : begin].tolist() == nano.encode("Hello")


def test_tokens_that_two_pairs_make(nano: Tokenizer) -> None:
    """Converted vocabularies have them: the library drops a merge that is out of date by its result alone."""
    values = copy.deepcopy(nano.values)
    vocab = values["model"]["vocab"]
    for token in ("ab", "bc", "abc", "ca", "abca"):
        vocab.setdefault(token, len(vocab))
    pairs = [("b", "c"), ("a", "bc"), ("c", "a"), ("ab", "c"), ("a", "b"), ("abc", "a"), ("ab", "ca")]
    rng = random.Random(0)
    texts = ["".join(rng.choices("abc ", k=rng.randrange(1, 30))) for _ in range(300)]
    for _ in range(20):
        rng.shuffle(pairs)
        values["model"]["merges"] = [list(pair) for pair in pairs]
        assert not differing(Tokenizer(values), texts)


def test_the_end_token_and_no_texts(nano: Tokenizer) -> None:
    ids, lengths = nano.encode_flat(["Hello", "", "你好"], last=nano.eos_id)
    assert ids.tolist() == [*nano.encode("Hello"), 3, 3, *nano.encode("你好"), 3]
    assert lengths.tolist() == [len(nano.encode("Hello")) + 1, 1, len(nano.encode("你好")) + 1]
    ids, lengths = nano.encode_flat([])
    assert (len(ids), len(lengths), nano.encode_batch([])) == (0, 0, [])


def test_many_threads_at_once(nano: Tokenizer) -> None:
    rng = random.Random(1)
    texts = ["".join(rng.choices("abc de 你好。1", k=500)) for _ in range(50)]
    expected = [nano.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert all(found == expected for found in pool.map(nano.encode_batch, [texts] * 40))


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}},
        {"normalizer": {"type": "NFKC"}},
        {"added_tokens": [{"id": 12_288, "content": "<tool>", "special": False}]},
        {"model": {"ignore_merges": True}},
        {"model": {"byte_fallback": False}},
    ],
    ids=str,
)
def test_another_structure_is_left_to_the_library(nano: Tokenizer, change: dict[str, Any]) -> None:
    values = {**nano.values, **change}
    if "model" in change:
        values["model"] = {**nano.values["model"], **change["model"]}
    if "added_tokens" in change:
        values["added_tokens"] = [*nano.values["added_tokens"], *change["added_tokens"]]
    assert make_encoder(values) is None


def test_without_compiled_code(nano: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    library = Tokenizer(nano.values)
    texts = ["Hello ▁ 12", "", "你好"]
    expected, lengths = nano.encode_flat(texts, last=3)
    found = library.encode_flat(texts, last=3)
    assert library._encoder is None
    assert np.array_equal(found[0], expected)
    assert np.array_equal(found[1], lengths)
