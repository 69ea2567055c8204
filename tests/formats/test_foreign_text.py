"""Tokenizers of other publishers' models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from xverse.formats.foreign import ForeignTokenizer, load_foreign_tokenizer

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
PIECE_FAMILIES = ("baichuan", "baichuan2", "chatglm2", "internlm")


@pytest.fixture(scope="session")
def processor(spm_bytes: bytes) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=spm_bytes)


@pytest.fixture
def load(foreign_tokenizers: dict[str, Path]) -> Any:
    def load(family: str) -> ForeignTokenizer:
        return load_foreign_tokenizer(foreign_tokenizers["sentencepiece"], family)

    return load


def write_llama_json(path: Path, processor: Any) -> Path:
    """``tokenizer.json`` of the same vocabulary, as conversions of Llama lay it out."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocab = {processor.id_to_piece(index): index for index in range(processor.get_piece_size())}
    merges = [
        (piece[:cut], piece[cut:])
        for index, piece in enumerate(vocab)
        if processor.is_unknown(index) + processor.is_control(index) + processor.is_byte(index) == 0
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab and piece not in ("<eoh>", "<eoa>")
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.enable_truncation(2)  # as a training run may have left it
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize("family", PIECE_FAMILIES)
def test_ids_are_sentencepieces_own(family: str, load: Any, processor: Any, tiny_texts: list[str]) -> None:
    tokenizer = load(family)
    for text in [*TEXTS, *tiny_texts]:
        assert tokenizer.encode(text) == processor.encode(text)
    assert tokenizer.eos_id == 2


def test_what_stands_before_a_text(load: Any) -> None:
    found = {family: load(family).bos_ids for family in PIECE_FAMILIES}
    assert found == {
        "baichuan": (),
        "baichuan2": (),
        "chatglm2": (481, 483),  # [gMASK] and sop, behind the 480 pieces
        "internlm": (1,),
    }
    assert load("chatglm2").vocab_size == 485
    assert load("internlm").vocab_size == 480


@pytest.mark.parametrize("family", ["baichuan", "internlm"])
@pytest.mark.parametrize("stated", [True, False])
def test_the_published_settings_decide_on_bos(
    family: str, stated: bool, foreign_tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(foreign_tokenizers["sentencepiece"], tmp_path / "model")
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": stated, "tokenizer_class": "LLaMATokenizer", "bos_token": ""})
    )
    assert load_foreign_tokenizer(directory, family).bos_ids == ((1,) if stated else ())


def test_a_llama_tokenizer_json_gives_the_same_ids(
    tmp_path: Path, processor: Any, tiny_texts: list[str]
) -> None:
    tokenizer = load_foreign_tokenizer(write_llama_json(tmp_path / "model", processor), "internlm")
    for text in [*TEXTS[1:], *tiny_texts]:
        assert tokenizer.encode(text) == processor.encode(text), text
    assert (tokenizer.bos_ids, tokenizer.eos_id, tokenizer.vocab_size) == ((1,), 2, 480)


def test_byte_level_tokenizers(foreign_tokenizers: dict[str, Path], tiny_texts: list[str]) -> None:
    import tokenizers

    directory = foreign_tokenizers["byte-level"]
    library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer = load_foreign_tokenizer(directory, "falcon")
    for text in [*TEXTS, *tiny_texts]:
        assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids
    end = tokenizer.eos_id
    assert (tokenizer.bos_ids, end) == ((), library.token_to_id("<|endoftext|>"))
    assert tokenizer.vocab_size == library.get_vocab_size() > library.get_vocab_size(with_added_tokens=False)
    assert end not in tokenizer.encode("one<|endoftext|>two"), "text must not become a special token"
