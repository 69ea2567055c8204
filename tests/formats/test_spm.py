"""The vocabulary for llama.cpp, checked with the algorithm that llama.cpp runs, here in Python."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.scale import examples
from xverse.config import UserError
from xverse.formats.spm import TokenType, random_differences, spm_encode, spm_vocabulary
from xverse.tokenizer import Tokenizer

from .upstream import break_tokenizer

NANO = Path(__file__).parents[2] / "src" / "xverse" / "assets" / "nano"
relaxed = settings(
    max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
pieces = st.sampled_from(
    [*" \t\n\r1.,(日éЖ🙂ถक्", "  ", "   ", "\r\n", "<|endoftext|>", "<0x41>", "the", "你好"]
)
texts = st.lists(st.characters(exclude_categories=["Cs"], exclude_characters="▁") | pieces, max_size=12)


@pytest.fixture(scope="module")
def published(tiny_tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer of upstream's layout, which cuts before every space."""
    return Tokenizer(break_tokenizer(tiny_tokenizer.values))


@relaxed
@given(parts=texts)
def test_same_ids_for_the_published_layout(published: Tokenizer, parts: list[str]) -> None:
    vocabulary = spm_vocabulary(published, published.vocab_size)
    text = "".join(parts)
    assert spm_encode(vocabulary, text) == published.encode(text)


@relaxed
@given(parts=texts)
def test_same_ids_for_our_layout(tiny_tokenizer: Tokenizer, parts: list[str]) -> None:
    vocabulary = spm_vocabulary(tiny_tokenizer, tiny_tokenizer.vocab_size)
    text = "".join(parts)
    assert spm_encode(vocabulary, text) == tiny_tokenizer.encode(text)


def test_a_word_takes_the_last_space_of_a_run() -> None:
    nano = Tokenizer.load(NANO)
    vocabulary = spm_vocabulary(nano, nano.vocab_size)
    for text in ("a    the", "    return x\n        if", "a  \n", "   ", "x\n\n\ny", "\t\tx"):
        assert spm_encode(vocabulary, text) == nano.encode(text)


def test_what_gguf_cannot_express() -> None:
    """A literal ``▁``: nothing else differs."""
    nano = Tokenizer.load(NANO)
    vocabulary = spm_vocabulary(nano, nano.vocab_size)

    def shown(ids: list[int]) -> list[str]:
        return [vocabulary.tokens[index] for index in ids]

    assert shown(nano.encode("▁")) == ["<0xE2>", "<0x96>", "<0x81>"]
    assert shown(spm_encode(vocabulary, "▁")) == ["▁"]
    assert random_differences(nano, vocabulary) == 0


def test_kinds_and_scores(tiny_tokenizer: Tokenizer) -> None:
    size = tiny_tokenizer.vocab_size + 2
    vocabulary = spm_vocabulary(tiny_tokenizer, size)
    assert vocabulary.kinds[:5] == [
        TokenType.UNKNOWN,
        TokenType.CONTROL,
        TokenType.CONTROL,
        TokenType.CONTROL,
        TokenType.BYTE,
    ]
    assert vocabulary.kinds[259:261] == [TokenType.BYTE, TokenType.NORMAL]
    assert vocabulary.kinds[-2:] == [TokenType.UNUSED, TokenType.UNUSED]
    assert len(vocabulary.tokens) == len(set(vocabulary.tokens)) == size
    merges = tiny_tokenizer.values["model"]["merges"]
    score = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    words = ["".join(merge) for merge in merges if "".join(merge).strip("▁")]
    assert [score[word] for word in words] == sorted((score[word] for word in words), reverse=True)
    spaces = [score[text] for text in score if len(text) > 1 and not text.strip("▁")]
    assert max(spaces) < min(score[word] for word in words)


def test_tokens_that_no_text_leads_to_are_hidden(published: Tokenizer) -> None:
    vocab = published.values["model"]["vocab"]
    vocabulary = spm_vocabulary(published, published.vocab_size)
    assert "▁▁" in vocab  # learnt with our rule for runs of spaces; cut apart by upstream's
    assert vocabulary.tokens[vocab["▁▁"]] == "  "  # reads the same, and is never formed
    assert random_differences(published, vocabulary) == 0

    values = copy.deepcopy(published.values)  # a rule that comes too late to be used
    merges, vocab = values["model"]["merges"], values["model"]["vocab"]
    joined = {character for merge in merges for part in merge for character in part}
    a, b, c = [text for text in vocab if len(text) == 1 and text.isalpha() and text not in joined][:3]
    size = len(vocab)
    vocab |= {a + b: size, b + c: size + 1, a + b + c: size + 2}
    merges += [[a, b], [b, c], [a, b + c]]
    late = Tokenizer(values)
    vocabulary = spm_vocabulary(late, late.vocab_size)
    assert vocabulary.kinds[size + 2] is TokenType.UNUSED
    for text in (a + b, b + c, a + b + c, f"{b}{a}{b}{c}{c} "):
        assert spm_encode(vocabulary, text) == late.encode(text)


def test_nul_has_a_token(tiny_tokenizer: Tokenizer) -> None:
    values = copy.deepcopy(tiny_tokenizer.values)
    index = values["model"]["vocab"]["\0"] = len(values["model"]["vocab"])
    tokenizer = Tokenizer(values)
    vocabulary = spm_vocabulary(tokenizer, tokenizer.vocab_size)
    assert vocabulary.tokens[index] == "<0x00>"
    assert vocabulary.kinds[index] is TokenType.BYTE
    assert spm_encode(vocabulary, "a\0") == tokenizer.encode("a\0")


def test_tokenizer_without_byte_tokens(tiny_tokenizer: Tokenizer) -> None:
    values = copy.deepcopy(tiny_tokenizer.values)
    values["model"]["byte_fallback"] = False
    with pytest.raises(UserError, match="no byte tokens"):
        spm_vocabulary(Tokenizer(values), tiny_tokenizer.vocab_size)


def test_udhr(test_data: Path) -> None:
    """Every language, every token."""
    nano = Tokenizer.load(NANO)
    vocabulary = spm_vocabulary(nano, nano.vocab_size)
    files = sorted((test_data / "parallel" / "udhr").glob("*.txt"))
    assert len(files) == 41
    differing = {}
    for file in files:
        text = file.read_text(encoding="utf-8")
        ours, theirs = nano.encode(text), spm_encode(vocabulary, text)
        if ours != theirs:
            differing[file.stem] = len(ours) - len(theirs)
    assert not differing


def test_udhr_in_the_published_layout(test_data: Path) -> None:
    nano = Tokenizer(break_tokenizer(Tokenizer.load(NANO).values))
    vocabulary = spm_vocabulary(nano, nano.vocab_size)
    chosen = random.Random(0)
    for file in sorted((test_data / "parallel" / "udhr").glob("*.txt")):
        text = file.read_text(encoding="utf-8")
        assert spm_encode(vocabulary, text) == nano.encode(text)
        words = text.split()
        chosen.shuffle(words)
        mixed = "".join(word + chosen.choice([" ", "  ", "   ", "\n", "\t", ""]) for word in words[:500])
        assert spm_encode(vocabulary, mixed) == nano.encode(mixed)
