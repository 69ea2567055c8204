"""What vLLM and SGLang read of a directory; vLLM itself runs in ``benchmarks/peers/vllm_check.py``."""

from __future__ import annotations

import importlib
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from xverse.config import UserError
from xverse.formats import ModelDirectory, load_model
from xverse.formats.compressed import read_scheme
from xverse.formats.quantize import quantize_directory
from xverse.hf import XverseTokenizer
from xverse.hf.serving import XverseLlamaConfig
from xverse.kernels.linear import QuantLinear
from xverse.quant.settings import QuantSettings
from xverse.tokenizer.chat_template import CHAT_TEMPLATE

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = {
    "architectures": ["XverseForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_xverse.XverseConfig"},
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 8192,
    "max_tokenizer_truncation": 6144,
    "model_type": "xverse",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "bfloat16",
    "vocab_size": 100534,
}


def test_entry_points_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for group in ("vllm.general_plugins", "sglang.srt.plugins"):
        module, _, name = project["entry-points"][group]["xverse"].partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_published_config_is_llamas() -> None:
    config = XverseLlamaConfig.from_dict(PUBLISHED)
    assert config.architectures == ["XverseForCausalLM"]
    assert (config.num_key_value_heads, config.head_dim, config.tie_word_embeddings) == (32, 128, False)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 2, 3)
    assert config.rope_parameters["rope_theta"] == 10000.0
    scaled = {**PUBLISHED, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    parameters = XverseLlamaConfig.from_dict(scaled).rope_parameters
    assert (parameters["rope_type"], parameters["factor"], parameters["rope_theta"]) == ("linear", 2.0, 5e5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 64, "moe_top_k": 6}, "routed experts"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "spiral"),
        ({"num_attention_heads": 33}, "heads"),
    ],
)
def test_what_they_would_compute_wrongly_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        XverseLlamaConfig.from_dict({**PUBLISHED, **change})


def test_a_directory_without_a_template_gets_xverses(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tiny_tokenizer.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    assert XverseTokenizer.from_pretrained(tmp_path).chat_template == CHAT_TEMPLATE
    settings["chat_template"] = "{{ messages[0].content }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert XverseTokenizer.from_pretrained(tmp_path).chat_template == settings["chat_template"]


def test_int8_with_int8_activations_is_written_and_read(
    wide_config: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """As ``int-quantized``, with the weights that packed INT8 has."""
    from xverse.formats import save_hf
    from xverse.model.transformer import XverseForCausalLM, init_weights

    model = XverseForCausalLM(wide_config)
    init_weights(model, seed=0)
    save_hf(model, tiny_tokenizer, tmp_path / "model")
    loaded = {}
    for name, activations in (("packed", False), ("w8a8", True)):
        settings = QuantSettings(bits=8, method="rtn-row")
        target = tmp_path / name
        quantize_directory(tmp_path / "model", target, tiny_tokenizer, settings, activations=activations)
        loaded[name] = load_model(target)
    layers = [
        (layer, loaded["packed"].get_submodule(name))
        for name, layer in loaded["w8a8"].named_modules()
        if isinstance(layer, QuantLinear)
    ]
    assert len(layers) == 14
    assert all(bool((one.tiles == other.tiles).all()) for one, other in layers)
    stated = json.loads((tmp_path / "w8a8" / "config.json").read_text())["quantization_config"]
    assert stated["format"] == "int-quantized"
    assert "model.layers.0.mlp.up_proj.weight" in ModelDirectory(tmp_path / "w8a8").tensors.names
    group = stated["config_groups"]["group_0"]
    for change, message in (
        ({"input_activations": {**group["input_activations"], "dynamic": False}}, "quantised activations"),
        ({"weights": {**group["weights"], "num_bits": 4}}, "INT8 with a scale per row"),
    ):
        with pytest.raises(UserError, match=message):
            read_scheme({**stated, "config_groups": {"group_0": {**group, **change}}}, "config.json")
