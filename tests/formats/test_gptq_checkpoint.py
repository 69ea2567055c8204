"""GPTQ checkpoints in AutoGPTQ's published layout, against a dequantisation written from its description."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from xverse.config import UserError
from xverse.formats import load_model, logits
from xverse.formats.compare import fixed_tokens
from xverse.kernels.linear import QuantLinear
from xverse.model import XverseForCausalLM, init_weights

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def source(wide_config: Any) -> Any:
    model = XverseForCausalLM(wide_config)
    init_weights(model, seed=0)
    return model.half().eval()


def pack_words(values: Tensor, bits: int, dimension: int) -> Tensor:
    """int64 values into int32 words along ``dimension``, the first in the lowest bits."""
    count = 32 // bits
    parts = values.unflatten(dimension, (-1, count)).movedim(dimension + 1, -1)
    words = sum(parts[..., index] << (bits * index) for index in range(count))
    assert isinstance(words, Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


def gptq_layer(
    weight: Tensor, bits: int, group: int, symmetric: bool, act_order: bool, zero_offset: int, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """A linear [N, K] as AutoGPTQ stores it, and the float weight that the description gives for it."""
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = weight.shape
    group = inputs if group == -1 else group
    g_idx = torch.arange(inputs) // group
    if act_order:
        g_idx = g_idx[torch.randperm(inputs, generator=generator)]
    levels = 2**bits - 1
    scales = torch.empty(inputs // group, outputs)
    zeros = torch.empty(inputs // group, outputs, dtype=torch.int64)
    for number in range(inputs // group):
        part = weight.float()[:, g_idx == number]  # [N, group]
        if symmetric:
            scales[number] = 2 * part.abs().amax(1) / levels
            zeros[number] = (levels + 1) // 2
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scales[number] = (high - low) / levels
            zeros[number] = (-low / scales[number]).round().clamp(1, levels).long()
    # Scales that bfloat16 holds exactly, so that nothing but the layout is compared.
    scales = scales.bfloat16().half()
    integers = (weight.float().T / scales.float()[g_idx] + zeros[g_idx]).round().clamp(0, levels).long()
    dequantized = scales.float()[g_idx] * (integers - zeros[g_idx]).float()  # [K, N]
    tensors = {
        "qweight": pack_words(integers, bits, 0),
        "qzeros": pack_words(zeros - zero_offset, bits, 1),
        "scales": scales,
        "g_idx": g_idx.to(torch.int32),
    }
    return tensors, dequantized.T


def write(
    model: Any,
    path: Path,
    *,
    bits: int = 4,
    group: int = 64,
    symmetric: bool = True,
    act_order: bool = False,
    version: int = 1,
    separate: bool = False,
    file: str = "model.safetensors",
) -> dict[str, Tensor]:
    """Write the checkpoint; returns what its weights mean, by name."""
    path.mkdir()
    state: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for seed, (name, tensor) in enumerate(model.state_dict().items()):
        module = name.removesuffix(".weight")
        if module.endswith(LINEARS):
            layer, meant[name] = gptq_layer(tensor, bits, group, symmetric, act_order, 2 - version, seed)
            state |= {f"{module}.{suffix}": part for suffix, part in layer.items()}
        else:
            state[name] = tensor.clone()
            meant[name] = tensor.float()
    if file.endswith(".bin"):
        torch.save(state, path / file)
    else:
        save_file(state, path / file, {"format": "pt"})
    settings = {"bits": bits, "group_size": group, "desc_act": act_order, "sym": symmetric}
    if version == 2:
        settings["checkpoint_format"] = "gptq_v2"
    config = model.config.to_json("float16")
    if separate:
        (path / "quantize_config.json").write_text(json.dumps({**settings, "damp_percent": 0.01}))
    else:
        config["quantization_config"] = {"quant_method": "gptq", **settings}
    (path / "config.json").write_text(json.dumps(config))
    return meant


VARIANTS: list[dict[str, Any]] = [
    {},
    {"separate": True, "file": "gptq_model-4bit-64g.safetensors"},
    {"file": "gptq_model-4bit-64g.bin"},
    {"symmetric": False},
    {"act_order": True},
    {"act_order": True, "symmetric": False},
    {"group": 128},
    {"group": -1},
    {"group": 32, "version": 2},
    {"group": 32, "version": 2, "symmetric": False, "act_order": True},
    {"bits": 8},
    {"bits": 8, "act_order": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_layout_is_converted_without_loss(source: Any, tmp_path: Path, variant: dict[str, Any]) -> None:
    meant = write(source, tmp_path / "gptq", **variant)
    plain = load_model(tmp_path / "gptq", dequantize=True)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, meant[name]), name
    model = load_model(tmp_path / "gptq", torch.float32)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, QuantLinear)
    assert layer.bits == (8 if variant.get("bits") == 8 or variant.get("symmetric") is False else 4)
    assert (layer.order is not None) == bool(variant.get("act_order") and variant.get("group") != -1)
    tokens = fixed_tokens(source.config.vocab_size)
    expected = logits(plain, tokens)
    error = (logits(model, tokens) - expected).norm() / expected.norm()
    assert error < 0.06  # the kernels quantise activations to int8


def test_layers_with_an_order_without_the_kernels_rounding(source: Any, tmp_path: Path) -> None:
    from xverse.kernels.ops import dequantized_linear

    meant = write(source, tmp_path / "gptq", act_order=True, symmetric=False)
    layer = load_model(tmp_path / "gptq").model.layers[1].mlp.down_proj
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    found = dequantized_linear(x[:, layer.order], layer.tiles, layer.out_features, layer.bits)
    expected = x @ meant["model.layers.1.mlp.down_proj.weight"].T
    assert (found - expected).abs().max() < 1e-4


def test_scales_beyond_bfloat16_are_rounded(source: Any, tmp_path: Path) -> None:
    meant = write(source, tmp_path / "gptq")["model.layers.0.self_attn.q_proj.weight"]
    file = tmp_path / "gptq" / "model.safetensors"
    state = load_file(file)
    name = "model.layers.0.self_attn.q_proj.scales"
    stretched = (state[name].float() * 1.003).half()
    factor = (stretched.float() / state[name].float()).T.repeat_interleave(64, dim=1)  # [N, K]
    state[name] = stretched
    save_file(state, file, {"format": "pt"})
    found = load_model(tmp_path / "gptq", dequantize=True).model.layers[0].self_attn.q_proj.weight
    error = (found - meant * factor).abs()
    assert error.max() > 0
    assert (error <= (meant * factor).abs() * 2**-8).all()


def test_through_transformers(source: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import xverse  # noqa: F401

    write(source, tmp_path / "gptq", act_order=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gptq", dtype=torch.float32)
    tokens = fixed_tokens(source.config.vocab_size)
    assert torch.equal(logits(model, tokens), logits(load_model(tmp_path / "gptq", torch.float32), tokens))
    with pytest.raises(UserError, match="activation order cannot be written"):
        model.save_pretrained(tmp_path / "again")


def test_saved_again_as_compressed_tensors(source: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import xverse  # noqa: F401

    write(source, tmp_path / "gptq", symmetric=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gptq", dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    a, b = (load_model(tmp_path / name, dequantize=True).state_dict() for name in ("gptq", "again"))
    assert all(torch.equal(a[name], b[name]) for name in a)


NAME = "model.layers.1.self_attn.o_proj"


@pytest.mark.parametrize(
    ("suffix", "change", "part"),
    [
        ("qweight", lambda t: t[:-1].clone(), "qweight is int32 [15, 128], not int32 [16, 128]"),
        ("qweight", lambda t: t.long(), "qweight is int64"),
        ("qzeros", lambda t: None, "qzeros is missing"),
        ("qzeros", lambda t: t[:, :-1].clone(), "qzeros is int32 [2, 15]"),
        ("scales", lambda t: None, "scales is missing"),
        ("scales", lambda t: t.int(), "scales is int32"),
        ("scales", lambda t: t.index_fill(1, torch.tensor([3]), torch.nan), "scales holds NaN"),
        ("g_idx", lambda t: t.index_fill(0, torch.tensor([3]), 1), "g_idx: its groups are not 2 of 64"),
        ("g_idx", lambda t: t[:-1].clone(), "g_idx is int32 [127]"),
    ],
)
def test_damaged_tensors_are_named(
    source: Any, tmp_path: Path, suffix: str, change: Callable[[Tensor], Tensor | None], part: str
) -> None:
    write(source, tmp_path / "gptq")
    file = tmp_path / "gptq" / "model.safetensors"
    state = load_file(file)
    changed = change(state.pop(f"{NAME}.{suffix}"))
    if changed is not None:
        state[f"{NAME}.{suffix}"] = changed
    save_file(state, file, {"format": "pt"})
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "gptq")
    text = str(caught.value)
    assert f"{NAME}.{part}" in text
    assert str(tmp_path / "gptq") in text
    assert "\n" not in text


def test_other_tensors_of_a_matrix_are_not_overlooked(source: Any, tmp_path: Path) -> None:
    write(source, tmp_path / "gptq")
    file = tmp_path / "gptq" / "model.safetensors"
    save_file(load_file(file) | {f"{NAME}.weight_scale": torch.ones(1)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"{NAME}\.weight_scale is unexpected"):
        load_model(tmp_path / "gptq")


def test_eight_bits_with_far_zero_points_are_refused(source: Any, tmp_path: Path) -> None:
    write(source, tmp_path / "gptq", bits=8, symmetric=False)
    file = tmp_path / "gptq" / "model.safetensors"
    state = load_file(file)
    state[f"{NAME}.qzeros"].fill_(0x01010101)
    save_file(state, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"_proj: weights of 8 bits with such zero points"):
        load_model(tmp_path / "gptq")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"bits": 3}, "bits = 3"),
        ({"bits": None}, "bits = None"),
        ({"group_size": 16}, "group_size = 16"),
        ({"group_size": "128"}, "group_size = 128"),
        ({"checkpoint_format": "marlin"}, "'marlin'"),
        ({"is_marlin_format": True}, "'marlin'"),
    ],
)
def test_settings_that_are_refused(source: Any, tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    write(source, tmp_path / "gptq")
    file = tmp_path / "gptq" / "config.json"
    values = json.loads(file.read_text())
    values["quantization_config"].update(changes)
    file.write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "gptq")
    assert part in str(caught.value)
    assert str(file) in str(caught.value)
