"""Bits per byte against a computation of its own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from xverse.data.feed import PretrainFeed
from xverse.data.mixture import MixtureConfig
from xverse.formats.write import llama_config
from xverse.model import XverseConfig, XverseForCausalLM, init_weights
from xverse.train.validate import bits_per_byte


@torch.no_grad()
def test_bits_per_byte_equals_llama_on_the_texts(prepared: Path, tiny_shape: dict[str, int]) -> None:
    """Each held-out text, tokenised anew, alone through Llama; log2 of the probabilities it gives."""
    model = XverseForCausalLM(XverseConfig(**tiny_shape, initializer_range=0.1))
    init_weights(model, seed=1)
    llama = LlamaForCausalLM(LlamaConfig(**llama_config(model.config, torch.float32))).eval()
    llama.load_state_dict(model.state_dict())
    source = PretrainFeed(prepared, MixtureConfig(), 8, 0)
    tokenizer = source.tokenizer
    expected = {}
    longest = 0
    for name in ("en", "zh"):
        bits, size = 0.0, 0
        shard = source.valid[name]
        for index in range(len(shard)):
            text = tokenizer.decode(shard.document(index).tolist())
            ids = [*tokenizer.encode(text), tokenizer.eos_id]
            scores = llama(torch.tensor([ids])).logits[0, :-1].double().log_softmax(dim=-1)
            bits -= sum(float(scores[i, token]) for i, token in enumerate(ids[1:])) / math.log(2)
            first = tokenizer.decode(ids[:1])  # not scored; the token of a single byte is no character
            size += len(text.encode()) - (1 if first == "\ufffd" else len(first.encode()))
            longest += len(ids)
        expected[name] = bits / size
    expected["all"] = sum(expected.values()) / 2
    # One row holds a whole source, so that no document is cut.
    feed = PretrainFeed(prepared, MixtureConfig(), longest, 0)
    figures = bits_per_byte(model, feed, batch_size=3, max_tokens=None, dtype="float32")
    assert list(figures) == ["all", "en", "zh"]
    assert figures == pytest.approx(expected, rel=1e-5)
    rounded = bits_per_byte(model, feed, batch_size=1, max_tokens=None, dtype="bfloat16")
    assert rounded == pytest.approx(expected, rel=0.01)


def test_nothing_held_out_is_no_figure(prepared: Path, tiny_shape: dict[str, int]) -> None:
    feed = PretrainFeed(prepared, MixtureConfig(), 32, 0)
    feed.valid = {}
    model = XverseForCausalLM(XverseConfig(**tiny_shape))
    assert bits_per_byte(model, feed, batch_size=1, max_tokens=None, dtype="float32") == {}
