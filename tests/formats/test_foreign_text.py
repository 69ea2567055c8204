"""Tokenizers of other publishers' models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xverse.eval.any_model import load_any
from xverse.formats import ModelDirectory
from xverse.formats.foreign import load_foreign_tokenizer

from .test_foreign_models import make

sentencepiece = pytest.importorskip("sentencepiece", reason='needs pip install "xverse-lm[eval]"')

TEXTS = [
    "",
    " ",
    "Hello, world",
    "  two  spaces",
    "问：天气\n答：晴 🙂",
    "a\tb\r\n",
    "2023 <s> </s> <unk>",
    "é",
]


@pytest.fixture(scope="session")
def processor(spm_bytes: bytes) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=spm_bytes)


def test_chatglm2(foreign_tokenizers: dict[str, Path], processor: Any, tiny_texts: list[str]) -> None:
    tokenizer = load_foreign_tokenizer(foreign_tokenizers["sentencepiece"], "chatglm")
    for text in [*TEXTS, *tiny_texts]:
        assert tokenizer.encode(text) == processor.encode(text)
    assert tokenizer.bos_ids == (481, 483)  # [gMASK] and sop, after the 480 pieces
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (2, 485)


@pytest.mark.parametrize(("name", "first"), [("baichuan", []), ("baichuan2", []), ("internlm", [1])])
def test_families_of_the_one_forward_pass(
    name: str,
    first: list[int],
    tmp_path: Path,
    foreign_tokenizers: dict[str, Path],
    processor: Any,
    tiny_texts: list[str],
) -> None:
    """Evaluation with transformers encodes as sentencepiece does, after what begins the family's texts."""
    directory = make(name, tmp_path, foreign_tokenizers)
    if not first:  # as published; the publisher's class would add one
        (directory / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    encode = load_any(ModelDirectory.of(directory))[1]
    for text in [*TEXTS, *tiny_texts]:
        assert encode(text) == [*first, *processor.encode(text)], text
    for stated in (True, False):
        settings = {"add_bos_token": stated, "tokenizer_class": "LLaMATokenizer", "bos_token": "<s>"}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        encode = load_any(ModelDirectory.of(directory))[1]
        assert encode("one")[0] == 1 if stated else encode("one")[0] != 1


def test_byte_level_tokenizers(foreign_tokenizers: dict[str, Path], tiny_texts: list[str]) -> None:
    import tokenizers

    directory = foreign_tokenizers["byte-level"]
    library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer = load_foreign_tokenizer(directory, "RefinedWebModel")
    for text in [*TEXTS, *tiny_texts]:
        assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids
    end = tokenizer.eos_id
    assert (tokenizer.bos_ids, end) == ((), library.token_to_id("<|endoftext|>"))
    assert tokenizer.vocab_size == library.get_vocab_size() > library.get_vocab_size(with_added_tokens=False)
    assert end not in tokenizer.encode("one<|endoftext|>two"), "text must not become a special token"
