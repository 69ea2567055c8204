"""GGUF files as models: written by us and by the gguf package, damaged in every place, and a real one."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scale import examples
from xverse.config import UserError
from xverse.formats import ModelDirectory, load_model
from xverse.formats.gguf import save_gguf
from xverse.formats.gguf_header import read_header
from xverse.formats.quantize import load_quantizing
from xverse.model import FullCausal, XverseConfig, XverseForCausalLM
from xverse.model.scaling import RopeScaling
from xverse.model.transformer import init_weights

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def written(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    config = XverseConfig(
        vocab_size=tiny_tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    model = XverseForCausalLM(config)
    init_weights(model, 0)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    save_gguf(model, tiny_tokenizer, path, "f16")
    return model, path


@torch.no_grad()
def test_what_we_write_reads_back(written: Any, tiny_tokenizer: Any) -> None:
    model, path = written
    directory = ModelDirectory.named(str(path))
    again = load_model(directory)
    tokens = torch.arange(40)[None] % model.config.vocab_size
    expected, logits = (m(tokens, FullCausal(1, 40)) for m in (model, again))
    assert torch.allclose(logits, expected, atol=2e-3)  # float16
    quantised = load_quantizing(directory, "int8")(tokens, FullCausal(1, 40))
    assert (quantised - expected).norm() < 0.05 * expected.norm()
    text = "def f(x):\n    return 中文 + x  # done"
    assert directory.tokenizer.decode(directory.tokenizer.encode(text)) == text
    assert directory.tokenizer.template is None  # XVERSE's own chat format


@settings(max_examples=examples(120), deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_in_a_line(written: Any, data: st.DataObject) -> None:
    _, path = written
    whole = path.read_bytes()
    header = 4000
    damaged = path.with_name("damaged.gguf")
    if data.draw(st.booleans()):
        damaged.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    else:
        at = data.draw(st.integers(0, header))
        new = data.draw(st.binary(min_size=1, max_size=8))
        damaged.write_bytes(whole[:at] + new + whole[at + len(new) :])
    message = ""
    try:
        load_model(damaged)
        ModelDirectory.of(damaged).tokenizer.encode("text")
    except UserError as error:
        message = str(error)
    assert "\n" not in message


ABSURD = {
    "no magic": b"GGML" + bytes(20),
    "version": b"GGUF" + struct.pack("<IQQ", 9, 0, 0),
    "a count of tensors": b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0),
    "a count of keys": b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60),
    "a long key": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 50),
    "a long array": b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 1 << 55),
    "an array of arrays": b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1),
    "empty": b"",
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "a part": b"GGUF" + struct.pack("<IQQQ11sIH", 3, 0, 1, 11, b"split.count", 2, 2),
    "a pointer": b"version https://git-lfs.github.com/spec/v1",
}


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_headers_end_at_once(case: str, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(ABSURD[case])
    with pytest.raises(UserError, match=r"x\.gguf") as error:
        read_header(file)
    assert "\n" not in str(error.value)


def test_every_type_is_decoded_as_the_package_does(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)
    kinds = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
    for kind in kinds:
        number = gguf.GGMLQuantizationType[kind]
        path = tmp_path / f"{kind}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tensor("token_embd.weight", gguf.quants.quantize(values, number), raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        from xverse.formats.gguf_read import decoded

        tensor = decoded(read_header(path).tensors["token_embd.weight"])
        assert tensor.shape == (4, 256)
        assert (tensor.numpy() - values).std() < 0.1
    for kind in ("Q4_K", "Q5_K", "Q6_K"):  # which the package only decodes
        assert gguf.GGMLQuantizationType[kind] in gguf.quants._type_traits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "gemma"}, "architecture 'gemma' is not supported"),
        ({"llama.expert_count": 8}, "expert_count = 8"),
        ({"llama.attention.head_count": 0}, "head_count is 0"),
        ({"llama.embedding_length": None}, "embedding_length is None"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer 'bert' is not supported"),
        ({"tokenizer.ggml.tokens": None}, "holds no tokenizer"),
        ({"tokenizer.ggml.scores": []}, "--tokenizer DIR"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "has no llama.attention.layer_norm_rms_epsilon"),
        ({"llama.attention.head_count_kv": [2, 1]}, r"expected int, found list '\[2, 1\]'"),
        *(
            ({f"llama.{key}": value}, f"{key} = {value} is not supported, only")
            for key, value in (
                *(("rope.dimension_count", 8), ("attention.value_length", 8), ("attention.causal", False)),
                *(("embedding_scale", 2.0), ("residual_scale", 2.0), ("attention.scale", 0.5)),
                *(("rope.scaling.yarn_ext_factor", 0.0), ("rope.scaling.attn_factor", 0.5)),
                ("rope.scaling.yarn_log_multiplier", 0.1),
            )
        ),
    ],
)
def test_metadata_that_does_not_fit(written: Any, changes: dict[str, Any], message: str) -> None:
    directory = ModelDirectory.of(written[1])
    metadata = directory.header.metadata  # type: ignore[attr-defined]
    metadata |= changes
    with pytest.raises(UserError, match=message):
        print(directory.config, directory.tokenizer)


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({"rope.scaling.factor": 4.0}, "rope_scaling", RopeScaling(rope_type="linear", factor=4.0)),
        ({"rope.scale_linear": 4.0}, "rope_scaling", RopeScaling(rope_type="linear", factor=4.0)),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, "rope_scaling", None),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
                "rope.scaling.yarn_beta_fast": 16.0,
            },
            "rope_scaling",
            RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=16.0),
        ),
        ({"attention.head_count_kv": [2, 2]}, "num_key_value_heads", 2),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id", None),
    ],
)
def test_metadata_of_other_writers(written: Any, changes: dict[str, Any], field: str, expected: Any) -> None:
    directory = ModelDirectory.of(written[1])
    for key, value in changes.items():
        directory.header.metadata[key if "ggml" in key else f"llama.{key}"] = value  # type: ignore[attr-defined]
    assert getattr(directory.config, field) == expected
    assert 10**6 not in directory.generation_config.get("eos_token_id", [])


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts"])
def test_modules_without_end_are_refused_before_they_are_made(tiny_config: Any, key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} must be at most 4096, not 2147483648"):
        dataclasses.replace(tiny_config, **{key: 2**31})
    if key == "num_hidden_layers":
        with pytest.raises(UserError, match=f"{key} must be at most 4096"):
            XverseConfig.from_json(tiny_config.to_json() | {key: 2**31})
