"""Writing model directories: what stock transformers makes of them, and what happens when writing fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests import forkserver
from xverse.config import UserError
from xverse.formats import ModelDirectory, load_model, load_tokenizer, logits, parity, save_hf, save_llama
from xverse.formats.compare import TOLERANCE, fixed_tokens

TEXTS = ["Hello world 2024", "你好，世界！", " two  spaces", "Human: hi\n\nAssistant: ", "😀\n\tмир"]


def test_hf_directory(model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    generation = {"top_k": 7, "eos_token_id": 3}
    save_hf(model, tiny_tokenizer, tmp_path / "a" / "hf", generation_config=generation)
    path = tmp_path / "a" / "hf"
    assert sorted(item.name for item in path.iterdir()) == [
        "config.json",
        "configuration_xverse.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_xverse.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["XverseForCausalLM"]
    assert config["torch_dtype"] == "bfloat16"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_xverse.XverseForCausalLM"
    assert ModelDirectory.of(path).generation_config == generation
    assert parity(model, load_model(path)) == 0.0
    assert load_tokenizer(path).hash == tiny_tokenizer.hash
    assert [item.name for item in path.parent.iterdir()] == ["hf"]


def test_shards_and_index(model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    save_hf(model, tiny_tokenizer, tmp_path / "m", torch.float16, max_shard_bytes=100_000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    found = {}
    for file in sorted((tmp_path / "m").glob("*.safetensors")):
        state = load_file(file)  # the library's own reader
        size = sum(t.numel() * 2 for t in state.values())
        assert size <= 100_000 or len(state) == 1
        assert all(t.dtype == torch.float16 for t in state.values())
        found.update(dict.fromkeys(state, file.name))
    assert found == index["weight_map"]
    assert index["metadata"]["total_size"] == 2 * model.config.num_parameters()
    reference = {name: t.half() for name, t in model.state_dict().items()}
    for name, tensor in load_model(tmp_path / "m").state_dict().items():
        assert torch.equal(tensor, reference[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stock_llama(model: Any, tiny_tokenizer: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    save_llama(model, tiny_tokenizer, tmp_path / "llama", dtype, max_shard_bytes=200_000)
    assert not list((tmp_path / "llama").glob("*.py"))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype="auto")  # no trust_remote_code
    assert type(stock) is LlamaForCausalLM
    assert next(stock.parameters()).dtype == dtype
    assert parity(model, stock) <= TOLERANCE
    assert next(stock.parameters()).dtype == dtype  # comparing widened nothing for good


def test_stock_tokenizer(model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for save in (save_llama, save_hf):
        path = tmp_path / save.__name__
        save(model, tiny_tokenizer, path)
        if save is save_hf:  # AutoTokenizer must not need the model's config class
            config = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps({**config, "model_type": "llama", "auto_map": {}}))
        stock = AutoTokenizer.from_pretrained(path)
        for text in TEXTS:
            assert stock(text)["input_ids"] == tiny_tokenizer.encode(text)
            assert stock.decode(tiny_tokenizer.encode(text)) == text
        assert (stock.pad_token_id, stock.bos_token_id, stock.eos_token_id) == (1, 2, 3)
        chat = stock.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        assert chat.startswith("Human: hi")


def test_licence_and_card_travel_along(model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    for name in ("LICENSE", "README.md", "train.log"):
        (tmp_path / name).write_text(name)
    save_hf(model, tiny_tokenizer, tmp_path / "out", documents=tmp_path)
    assert (tmp_path / "out" / "LICENSE").read_text() == "LICENSE"
    assert (tmp_path / "out" / "README.md").exists()
    assert not (tmp_path / "out" / "train.log").exists()


def test_what_is_there_is_not_overwritten(model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_hf(model, tiny_tokenizer, tmp_path / "empty")
    with pytest.raises(UserError, match="--overwrite"):
        save_llama(model, tiny_tokenizer, tmp_path / "empty")
    save_llama(model, tiny_tokenizer, tmp_path / "empty", overwrite=True)
    assert not list((tmp_path / "empty").glob("*.py"))  # replaced whole, not mixed
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").touch()
    with pytest.raises(UserError, match="not a model directory"):
        save_hf(model, tiny_tokenizer, photos, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        save_hf(model, tiny_tokenizer, photos / "cat.jpg", overwrite=True)
    with pytest.raises(UserError, match="cannot be written"):
        save_hf(model, tiny_tokenizer, photos / "cat.jpg" / "model")
    assert [item.name for item in photos.iterdir()] == ["cat.jpg"]


def test_a_model_may_replace_its_own_source(model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    save_hf(model, tiny_tokenizer, tmp_path / "m")
    mapped = load_model(tmp_path / "m")
    save_hf(mapped, tiny_tokenizer, tmp_path / "m", overwrite=True)
    assert parity(model, load_model(tmp_path / "m")) == 0.0
    assert parity(model, mapped) == 0.0


def test_tokenizer_that_does_not_fit(model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    from xverse.model import XverseConfig, XverseForCausalLM

    small = XverseConfig(
        vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(UserError, match="do not belong together"):
        save_hf(XverseForCausalLM(small), tiny_tokenizer, tmp_path / "m")
    with pytest.raises(UserError, match="int8 weights cannot be written"):
        save_hf(model, tiny_tokenizer, tmp_path / "m", torch.int8)
    assert not list(tmp_path.iterdir())


def test_shim_says_what_is_missing(
    model: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.dynamic_module_utils import get_imports

    save_hf(model, tiny_tokenizer, tmp_path / "m")
    monkeypatch.setitem(sys.modules, "xverse.hf", None)  # as without the package, or with its namesake
    for file in (tmp_path / "m").glob("*.py"):
        assert get_imports(file) == []  # so transformers lets it run, and its own message through
        with pytest.raises(ImportError, match="pip install xverse-lm"):
            exec(file.read_text())


@pytest.mark.parametrize("shard_bytes", [1, 10**9])
def test_disk_full(model: Any, tiny_tokenizer: Any, small_disk: Path, shard_bytes: int) -> None:
    with pytest.raises(UserError) as caught:
        save_hf(model, tiny_tokenizer, small_disk / "m", torch.float32, max_shard_bytes=shard_bytes)
    assert str(caught.value) == f"{small_disk / 'm'}: the disk is full; nothing was written"
    assert not list(small_disk.iterdir())


def test_disk_full_leaves_the_old_model(model: Any, tiny_tokenizer: Any, small_disk: Path) -> None:
    save_hf(model, tiny_tokenizer, small_disk / "m", max_shard_bytes=10**9)
    with pytest.raises(UserError, match="the disk is full"):
        save_hf(model, tiny_tokenizer, small_disk / "m", torch.float32, overwrite=True)
    assert [item.name for item in small_disk.iterdir()] == ["m"]
    assert parity(model, load_model(small_disk / "m")) == 0.0


def test_file_size_limit_is_one_clear_line(upstream: Path, tmp_path: Path) -> None:
    """As on a disk with a quota; the command line runs as a user runs it."""
    pytest.importorskip("resource")
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "from xverse.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "out"
    arguments = ["export", "--model", str(upstream), "--out", str(out), "--format", "hf"]
    result = forkserver.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == f"xverse: {out}: File too large; nothing was written\n"
    assert not list(tmp_path.iterdir())


def test_parity_sees_a_difference_and_restores_dtypes(model: Any, upstream: Path) -> None:
    other = load_model(upstream)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[0, 0] += 1.0
    assert parity(model, other) > 1e-3
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
    tokens = fixed_tokens(model.config.vocab_size)
    wide = load_model(upstream, dtype=torch.float32)
    assert torch.equal(logits(model, tokens), logits(wide, tokens))
    assert logits(model, tokens).dtype == torch.float32
    assert isinstance(model, nn.Module)
    assert not any(module._forward_hooks for module in model.modules())
