"""Relatives of XVERSE to GGUF and back: the same numbers, tokens, template and metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.family_zoo import write_family
from xverse.cli import main
from xverse.config import UserError
from xverse.formats import ModelDirectory, load_model
from xverse.formats.gguf_header import read_header
from xverse.formats.gguf_tokenizer import _parts, split_name
from xverse.model import FullCausal
from xverse.tokenizer import encode_chat

TEXT = "def f(x):\n    return 中文 + x  # 1234 isn't done"
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "biases": ("Llama", "llama", {"attention_bias": True}),
    "mistral": ("Mistral", "llama", {"sliding_window": None}),
    "qwen2": ("Qwen2", "qwen2", {}),
    "qwen3": ("Qwen3", "qwen3", {"head_dim": 32}),
}


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(path, torch.float32)(torch.arange(3, 60)[None], FullCausal(1, 57))


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: str, tiny_texts: list[str], tmp_path: Path, capsys: Any) -> None:
    family, architecture, changes = CASES[case]
    source, file, back = tmp_path / "source", tmp_path / "m.gguf", tmp_path / "back"
    write_family(source, tiny_texts, family, **changes)
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 0], "temperature": 0.5}')
    as_gguf = ["--format", "gguf", "--type", "f32"]
    assert main(["export", "--model", str(source), "--out", str(file), *as_gguf]) == 0
    assert "max |Δlogit| = 0.0e+00" in capsys.readouterr().out
    header = read_header(file)
    assert header.metadata["general.architecture"] == architecture
    assert header.metadata["tokenizer.ggml.eos_token_id"] == 2
    expected, found = ModelDirectory.of(source), ModelDirectory.of(file)
    assert found.tokenizer.encode(TEXT) == expected.tokenizer.encode(TEXT)
    assert found.tokenizer.template == expected.tokenizer.template
    assert found.generation_config["eos_token_id"] == [2, 0]
    messages = [{"role": "user", "content": "hello <|im_end|>"}]
    prompts = [encode_chat(d.tokenizer, messages, max_new_tokens=4).ids for d in (expected, found)]
    assert prompts[0] == prompts[1]
    assert torch.allclose(logits(file), logits(source), atol=1e-4)
    assert main(["export", "--model", str(file), "--out", str(back), "--format", "hf"]) == 0
    assert torch.equal(logits(back), logits(file))
    again = tmp_path / "again.gguf"
    assert main(["export", "--model", str(back), "--out", str(again), *as_gguf]) == 0
    other = read_header(again)
    differing = {key for key in header.metadata if header.metadata[key] != other.metadata.get(key)}
    assert differing <= {"general.name"}
    assert header.tensors.keys() == other.tensors.keys()
    assert all((t.data == other.tensors[name].data).all() for name, t in header.tensors.items())


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "gpt-2", "smollm"])
def test_splits_of_words_are_named(name: str) -> None:
    values = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": _parts(name)}}
    assert split_name(json.loads(json.dumps(values))) == name
    values["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True  # type: ignore[index]
    with pytest.raises(UserError, match="has no name"):
        split_name(values)
