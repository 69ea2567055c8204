"""Reading model directories, sound and unsound."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from xverse.config import UserError
from xverse.formats import ModelDirectory, load_model, load_tokenizer, parity, save_hf, save_llama

SHARD = "pytorch_model-00002-of-00003.bin"


@pytest.fixture
def published(upstream: Path, tmp_path: Path) -> Path:
    """A copy of the upstream directory that the test may damage."""
    return Path(shutil.copytree(upstream, tmp_path / "published"))


@pytest.fixture
def written(model: Any, tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """A safetensors directory in two shards that the test may damage."""
    save_hf(model, tiny_tokenizer, tmp_path / "written", max_shard_bytes=150_000)
    return tmp_path / "written"


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def refused(action: Callable[[], object], *parts: str) -> None:
    """``action`` raises a UserError of one line that holds all of ``parts``."""
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


def test_upstream_as_published(upstream: Path, model: Any, tiny_tokenizer: Any) -> None:
    loaded = load_model(upstream)
    assert parity(model, loaded) == 0.0
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad and p.is_contiguous() for p in loaded.parameters())
    config = ModelDirectory.of(upstream).config
    assert config == model.config
    assert (config.rope_theta, config.max_tokenizer_truncation) == (10000.0, 6144)
    assert ModelDirectory.of(upstream).generation_config["top_k"] == 30
    text = "Human: 你好 XVERSE 2024\n\nAssistant: "
    assert load_tokenizer(upstream).encode(text) == tiny_tokenizer.encode(text)


def test_loading_maps_the_files(upstream: Path, written: Path, model: Any) -> None:
    for directory, suffix in ((upstream, ".bin"), (written, ".safetensors")):
        loaded = load_model(directory)
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if suffix in line]
        ranges = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in mapped]
        for name, parameter in loaded.named_parameters():
            address = parameter.data_ptr()
            assert any(start <= address < end for start, end in ranges), f"{name} was copied"
        with torch.no_grad():  # the mapping is private: training in it leaves the file alone
            loaded.lm_head.weight.zero_()
        assert parity(model, load_model(directory)) == 0.0


def test_conversion_while_loading(upstream: Path, written: Path, model: Any) -> None:
    for directory in (upstream, written):
        loaded = load_model(directory, dtype=torch.float32)
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        assert parity(model, loaded) == 0.0


def test_single_files_of_both_kinds(written: Path, model: Any) -> None:
    state = {name: t for path in written.glob("*.safetensors") for name, t in load_file(path).items()}
    for path in written.glob("model*"):
        path.unlink()
    torch.save(state, written / "pytorch_model.bin", _use_new_zipfile_serialization=False)  # before torch 1.6
    assert parity(model, load_model(written)) == 0.0
    save_file(state, written / "model.safetensors")
    (written / "pytorch_model.bin").write_bytes(b"not read, safetensors comes first")
    assert parity(model, load_model(written)) == 0.0


def test_llama_export_reads_back(model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    save_llama(model, tiny_tokenizer, tmp_path / "llama")
    config = ModelDirectory.of(tmp_path / "llama").config
    assert (config.model_type, config.norm_in_float32) == ("llama", False)  # read as any Llama
    own = {name: getattr(model.config, name) for name in ("model_type", "norm_in_float32")}
    own |= {"max_tokenizer_truncation": model.config.max_tokenizer_truncation}
    assert dataclasses.replace(config, **own) == model.config
    assert parity(model, load_model(tmp_path / "llama")) == 0.0


def test_saved_by_transformers_reads_back(model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    save_llama(model, tiny_tokenizer, tmp_path / "llama")
    LlamaForCausalLM.from_pretrained(tmp_path / "llama").save_pretrained(tmp_path / "again")
    assert parity(model, load_model(tmp_path / "again")) == 0.0


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model_type": "gemma2"}, "'gemma2' is not supported"),
        ({"model_type": None}, "None is not supported"),
        ({"model_type": "xverse", "attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"model_type": "xverse", "num_key_value_heads": 2}, "num_key_value_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type 'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope scaling: missing key 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor 0.5 is out of range"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "scale": 1.0}}, "unknown key 'scale'"),
        ({"model_type": "xverse", "tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"head_dim": 31}, "heads of an even size"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"num_experts": 64}, "num_experts"),
        ({"hidden_size": None}, "missing key 'hidden_size'"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"num_attention_heads": 5, "num_key_value_heads": None, "head_dim": None}, "does not split"),
    ],
)
def test_configs_that_do_not_fit(
    model: Any, tiny_tokenizer: Any, tmp_path: Path, changes: dict[str, Any], part: str
) -> None:
    from xverse.formats.write import llama_config

    (tmp_path / "config.json").write_text(json.dumps(llama_config(model.config, torch.float32)))
    edit(tmp_path / "config.json", **changes)
    refused(lambda: ModelDirectory.of(tmp_path).config, str(tmp_path / "config.json"), part)


def test_not_a_model_directory(upstream: Path, tmp_path: Path) -> None:
    refused(lambda: load_model(tmp_path), "not a model directory", "it is empty")
    (tmp_path / "holiday.jpg").touch()
    refused(lambda: load_model(tmp_path), "not a model directory", "holiday.jpg")
    refused(lambda: load_model(tmp_path / "holiday.jpg"), "is a file")
    refused(lambda: load_model(upstream.parent / "XVERSE-7B-Chta"), "did you mean 'XVERSE-7B-Chat'?")
    (tmp_path / "config.json").write_text("{'single': quotes}")
    refused(lambda: load_model(tmp_path), "config.json", "JSON")
    (tmp_path / "config.json").write_text("[1]")
    refused(lambda: load_model(tmp_path), "expected a JSON object")


def test_no_weights(published: Path) -> None:
    (published / "pytorch_model.bin.index.json").unlink()
    refused(lambda: load_model(published), "3 weight shards", "no *.index.json")
    for path in published.glob("*.bin"):
        path.unlink()
    refused(lambda: load_model(published), "has no weights")


def test_index_names_a_missing_file(published: Path) -> None:
    (published / SHARD).unlink()
    refused(lambda: load_model(published), "pytorch_model.bin.index.json", SHARD)
    index = published / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../../secret.bin"}}))
    refused(lambda: load_model(published), "'../../secret.bin' is not a file name")
    index.write_text(json.dumps({"weight_map": {}}))
    refused(lambda: load_model(published), "no weight_map")


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.999])
def test_truncated_shards(published: Path, written: Path, keep: float) -> None:
    for directory, pattern in ((published, "*2-of-*.bin"), (written, "*2-of-*.safetensors")):
        path = next(directory.glob(pattern))
        size = int(path.stat().st_size * keep) if isinstance(keep, float) else keep
        os.truncate(path, size)
        refused(lambda directory=directory: load_model(directory), str(path), "truncated")


def test_git_lfs_pointer(published: Path, written: Path) -> None:
    for path in (published / SHARD, next(written.glob("*.safetensors"))):
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
        refused(lambda path=path: load_model(path.parent), str(path), "git lfs pull")


class _Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("code-of-a-pickle-ran",)


def test_code_in_a_pickle_is_refused(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(published)
    torch.save({"lm_head.weight": _Code()}, published / SHARD)
    refused(lambda: load_model(published), SHARD, "holds more than tensors", "never run")
    (published / SHARD).write_bytes(pickle.dumps({"lm_head.weight": _Code()}, protocol=2))
    refused(lambda: load_model(published), SHARD)
    assert not Path("code-of-a-pickle-ran").exists()
    torch.save({"model.norm.weight": "a text"}, published / SHARD)
    refused(lambda: load_model(published), "'model.norm.weight' is not a tensor")
    torch.save([torch.zeros(1)], published / SHARD)
    refused(lambda: load_model(published), "found list")


def change_state(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    state = {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}
    for path in directory.glob("model*"):
        path.unlink()
    change(state)
    save_file(state, directory / "model.safetensors")


def test_missing_unexpected_and_misshaped_tensors_in_one_line(written: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        del state["model.layers.1.mlp.up_proj.weight"]
        state["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64, dtype=torch.bfloat16)
        state["model.norm.weight"] = torch.ones(32, dtype=torch.bfloat16)
        state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(128, 64, dtype=torch.int8)

    change_state(written, change)
    refused(
        lambda: load_model(written),
        "missing model.layers.1.mlp.up_proj.weight",
        "unexpected model.layers.0.self_attn.q_proj.bias",
        "model.norm.weight is 32 where the settings say 64",
        "model.layers.0.mlp.up_proj.weight is stored as int8",
    )


def test_absent_head(written: Path) -> None:
    change_state(written, lambda state: state.pop("lm_head.weight"))
    refused(lambda: load_model(written), "missing lm_head.weight", "is the head tied?")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"vocab_size": 999}, "embed_tokens.weight is"),
        ({"num_hidden_layers": 1}, "unexpected model.layers.1."),
        ({"num_hidden_layers": 3}, "missing model.layers.2."),
        ({"intermediate_size": 256}, "the settings say 256×64"),
    ],
)
def test_config_that_contradicts_its_tensors(published: Path, changes: dict[str, int], part: str) -> None:
    edit(published / "config.json", **changes)
    refused(lambda: load_model(published), "do not fit config.json", part)


def test_many_bad_tensors_stay_one_short_line(published: Path) -> None:
    edit(published / "config.json", num_hidden_layers=12)
    with pytest.raises(UserError, match=r"and \d+ more") as caught:
        load_model(published)
    assert len(re.sub(re.escape(str(published)), "", str(caught.value))) < 400


@pytest.mark.parametrize("value", ["2", 2.5, True, ["2"], {}, [[2]]])
def test_generation_configs_with_other_values_for_token_ids(value: Any, published: Path) -> None:
    (published / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    refused(lambda: ModelDirectory.of(published).generation_config, "eos_token_id must be a token id")


def test_missing_or_foreign_tokenizer(published: Path) -> None:
    edit(published / "config.json", vocab_size=10)
    refused(lambda: load_tokenizer(published), "they do not belong together")
    (published / "tokenizer.json").unlink()
    refused(lambda: load_tokenizer(published), "no tokenizer.json")
