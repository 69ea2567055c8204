from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from .upstream import write_upstream_directory


@pytest.fixture(scope="session")
def model(tiny_config: Any) -> Any:
    """A small ``XverseForCausalLM`` with bfloat16 weights, which every test leaves as they are."""
    from xverse.model import XverseForCausalLM, init_weights

    model = XverseForCausalLM(tiny_config)
    init_weights(model, seed=0)
    with torch.no_grad():
        for layer in model.model.layers:  # a norm weight of 1 would hide a wrong norm
            layer.input_layernorm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return model.bfloat16()


@pytest.fixture(scope="session")
def upstream(model: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in upstream's published layout; read only."""
    directory = tmp_path_factory.mktemp("upstream")
    (directory / "tokenizer").mkdir()
    tiny_tokenizer.save(directory / "tokenizer")
    return write_upstream_directory(directory / "XVERSE-7B-Chat", model, directory / "tokenizer")


@pytest.fixture(scope="session")
def spm_bytes(tiny_texts: list[str]) -> bytes:
    """A sentencepiece model of 480 pieces with Llama's settings, which writes most languages in bytes."""
    sentencepiece = pytest.importorskip("sentencepiece", reason='needs pip install "xverse-lm[eval]"')
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in tiny_texts if text.isascii()]),
        model_writer=written,
        vocab_size=480,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=["<eoh>", "<eoa>"],
        minloglevel=2,
    )
    return written.getvalue()


@pytest.fixture(scope="session")
def foreign_tokenizers(
    spm_bytes: bytes, tiny_texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Directories with the tokenizer files of sentencepiece families, and of Falcon and MPT; read only."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    pieces, bytes_ = tmp_path_factory.mktemp("sentencepiece"), tmp_path_factory.mktemp("byte-level")
    (pieces / "tokenizer.model").write_bytes(spm_bytes)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        tiny_texts,
        trainers.BpeTrainer(vocab_size=470, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet),
    )
    tokenizer.add_tokens([AddedToken(" " * count, normalized=True) for count in (3, 2)])
    tokenizer.add_special_tokens(["<|padding|>"])
    tokenizer.save(str(bytes_ / "tokenizer.json"))
    return {"sentencepiece": pieces, "byte-level": bytes_}
