"""llama.cpp itself on our files: token ids, logits, the end of a reply."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xverse.formats import load_model, load_tokenizer, logits, save_gguf
from xverse.formats.compare import fixed_tokens
from xverse.formats.gguf import KINDS
from xverse.formats.spm import spm_encode, spm_vocabulary
from xverse.tokenizer import Tokenizer

llama_cpp = pytest.importorskip("llama_cpp", reason='needs pip install "xverse-lm[bench]"')

NANO = Path(__file__).parents[2] / "src" / "xverse" / "assets" / "nano"
NASTY = [
    *" \t\n\réЖ日ถ🙂\u200d\u3000\xa0\x00\x01\x7fﬁ①aZ09.,(<|>'\"",
    *(
        "  ",
        "   ",
        "\r\n",
        "👩\u200d👩\u200d👧",
        "e\u0301",
        "می\u200cشود",
        "क्षा",
        "한국어",
        "Hello",
        "你好，",
    ),
    *("<|endoftext|>", "<|startoftext|>", "<unk>", "<pad>", "<0x41>", "</s>", "[UNUSED_3]"),
]


def load(path: Path, **options: Any) -> Any:
    settings = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False} | options
    return llama_cpp.Llama(str(path), **settings)


def tokens(llama: Any, text: str, special: bool = False) -> list[int]:
    """As a program calls it that adds what the file says is to be added: nothing."""
    return list(llama.tokenize(text.encode(), add_bos=True, special=special))


@pytest.fixture(scope="module")
def nano() -> Tokenizer:
    return load_tokenizer(NANO)


@pytest.fixture(scope="module")
def nano_gguf(nano: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "nano.gguf"
    save_gguf(load_model(NANO), nano, path)
    return path


@pytest.fixture(scope="module")
def llama(nano_gguf: Path) -> Iterator[Any]:
    model = load(nano_gguf)
    yield model
    model.close()


def test_udhr(llama: Any, nano: Tokenizer, test_data: Path) -> None:
    """Every language, every token."""
    differing = {}
    for file in sorted((test_data / "parallel" / "udhr").glob("*.txt")):
        text = file.read_text(encoding="utf-8")
        ours, theirs = nano.encode(text), tokens(llama, text)
        assert llama.detokenize(theirs).decode() == text
        if ours != theirs:
            differing[file.stem] = len(ours) - len(theirs)
    assert not differing


def test_nasty_texts(llama: Any, nano: Tokenizer) -> None:
    """Everything but a literal ``▁``, which GGUF cannot express (``formats/spm.py``)."""
    chosen = random.Random(0)
    for _ in range(3000):
        text = "".join(chosen.choices(NASTY, k=chosen.randrange(1, 16)))
        assert tokens(llama, text) == nano.encode(text), text
        assert tokens(llama, text, special=True) == nano.encode(text, allow_special=True), text


def test_our_copy_of_the_algorithm(llama: Any, nano: Tokenizer) -> None:
    """The figure that ``xverse export`` prints rests on it."""
    vocabulary = spm_vocabulary(nano, nano.vocab_size)
    chosen = random.Random(1)
    for _ in range(1000):
        text = "".join(chosen.choices([*NASTY, "▁", "    "], k=chosen.randrange(1, 16)))
        assert tokens(llama, text) == spm_encode(vocabulary, text), text


def test_published_layout(upstream: Path, tiny_texts: list[str], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(upstream)
    save_gguf(load_model(upstream), tokenizer, tmp_path / "m.gguf")
    llama = load(tmp_path / "m.gguf", vocab_only=True)
    chosen = random.Random(2)
    texts = ["".join(chosen.choices(NASTY, k=chosen.randrange(1, 16))) for _ in range(2000)]
    for text in [*tiny_texts, *texts]:
        assert tokens(llama, text) == tokenizer.encode(text), text
        assert tokens(llama, text, special=True) == tokenizer.encode(text, allow_special=True), text


# In float32 only the order of sums differs; in the others llama.cpp rounds activations to the file's type.
@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 1e-4), ("f16", 0.05), ("q8_0", 1.0)])
def test_logits(
    nano: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, tolerance: float
) -> None:
    monkeypatch.setitem(KINDS, "f32", "ALL_F32")  # no type that users need; here it isolates the graph
    model = load_model(NANO)
    save_gguf(model, nano, tmp_path / "m.gguf", kind)
    cache = {"type_k": 0, "type_v": 0} if kind == "f32" else {}  # 0: float32
    llama = load(tmp_path / "m.gguf", logits_all=True, **cache)
    batch = fixed_tokens(model.config.vocab_size)
    for row, wanted in zip(batch, logits(model, batch), strict=True):
        llama.reset()
        llama.eval(row.tolist())
        found = torch.from_numpy(np.array(llama.scores[: len(row)]))
        assert (found - wanted).abs().max() <= tolerance


def test_a_reply_ends(llama: Any) -> None:
    """The template is applied and id 3 ends the reply, without any setting."""
    assert (llama.token_bos(), llama.token_eos()) == (2, 3)
    answer = llama.create_chat_completion(
        [{"role": "user", "content": "Hello!"}], max_tokens=100, temperature=0.0
    )
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert "Human:" not in choice["message"]["content"]
    assert choice["message"]["content"].strip()
