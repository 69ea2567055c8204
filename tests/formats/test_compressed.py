"""compressed-tensors directories: against that library and plain transformers, and damaged in every way."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from xverse.config import UserError
from xverse.formats import ModelDirectory, load_model, logits, save_quantized
from xverse.formats.compare import fixed_tokens
from xverse.kernels.linear import QuantEmbedding, QuantLinear
from xverse.kernels.weight import QuantizedWeight
from xverse.model import XverseForCausalLM, init_weights
from xverse.quant.quantizer import Quantizer
from xverse.quant.settings import QuantSettings

CASES = [(4, "rtn", 128), (8, "rtn", 32), (4, "rtn", 64), (4, "rtn-row", 128), (8, "rtn-row", 128)]


@pytest.fixture(scope="module")
def wide(wide_config: Any) -> Any:
    """A model that groups of 128 fit, in bfloat16."""
    model = XverseForCausalLM(wide_config)
    init_weights(model, seed=0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return model.bfloat16().eval()


def quantized(model: Any, settings: QuantSettings) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    state = model.state_dict()

    def read(prefix: str) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}

    return Quantizer(model.config, read, settings).tensors()


def write(
    model: Any,
    tokenizer: Any,
    path: Path,
    bits: int = 4,
    method: Any = "rtn",
    group: int = 64,
    **options: Any,
) -> Path:
    head = 16 if options.get("llama") else None
    settings = QuantSettings(bits=bits, method=method, group_size=group, embedding_bits=16, head_bits=head)
    save_quantized(quantized(model, settings), model.config, tokenizer, path, **options)
    return path


@pytest.fixture
def written(wide: Any, tiny_tokenizer: Any, tmp_path: Path) -> Path:
    return write(wide, tiny_tokenizer, tmp_path / "written")


@pytest.mark.parametrize(("bits", "method", "group"), CASES)
def test_the_librarys_own_schema_and_packer(
    wide: Any, tiny_tokenizer: Any, tmp_path: Path, bits: int, method: Any, group: int
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationConfig

    path = write(wide, tiny_tokenizer, tmp_path / "q", bits, method, group)
    values = json.loads((path / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(values)
    assert (config.quant_method, config.format) == ("compressed-tensors", "pack-quantized")
    assert config.quantization_status == "compressed"
    by_target = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    assert by_target["Linear"].weights.num_bits == bits
    assert by_target["Linear"].weights.strategy == ("channel" if method == "rtn-row" else "group")
    assert config.ignore == (["lm_head"] if method == "rtn-row" else [])
    state = load_file(path / "model.safetensors")
    settings = QuantSettings(bits=bits, method=method, group_size=group, embedding_bits=16)
    for name, weight in quantized(wide, settings):
        if isinstance(weight, QuantizedWeight):
            module = name.removesuffix(".weight")
            assert torch.equal(state[f"{module}.weight_packed"], pack_to_int32(weight.q, weight.bits))
            assert torch.equal(state[f"{module}.weight_scale"], weight.scales)
            assert state[f"{module}.weight_shape"].tolist() == list(weight.q.shape)


@pytest.mark.parametrize(("bits", "method", "group"), CASES)
def test_plain_transformers_loads_the_llama_layout(
    wide: Any, tiny_tokenizer: Any, tmp_path: Path, bits: int, method: Any, group: int
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    path = write(wide, tiny_tokenizer, tmp_path / "q", bits, method, group, llama=True)
    tokens = fixed_tokens(wide.config.vocab_size)
    expected = logits(load_model(path, dequantize=True), tokens)
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert isinstance(stock, LlamaForCausalLM)
    assert (logits(stock, tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_transformers_own_quantizer_on_our_layout(wide: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoConfig

    from xverse.hf import XverseForCausalLM as HfModel

    path = write(wide, tiny_tokenizer, tmp_path / "q")
    config = AutoConfig.from_pretrained(path)
    config.quantization_config = config.quantization_config.to_dict()  # so that ours is not chosen
    loaded = HfModel.from_pretrained(path, config=config, dtype=torch.float32)
    tokens = fixed_tokens(wide.config.vocab_size)
    expected = logits(load_model(path, dequantize=True), tokens)
    assert type(loaded.lm_head) is torch.nn.Linear
    assert (logits(loaded, tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("bits", "method", "group"), CASES)
def test_loads_what_was_written(
    wide: Any, tiny_tokenizer: Any, tmp_path: Path, bits: int, method: Any, group: int
) -> None:
    path = write(wide, tiny_tokenizer, tmp_path / "q", bits, method, group, max_shard_bytes=60_000)
    assert len(list(path.glob("model-*.safetensors"))) > 2
    assert ModelDirectory.of(path).config == wide.config
    assert ModelDirectory.of(path).scheme is not None
    model = load_model(path)
    settings = QuantSettings(bits=bits, method=method, group_size=group, embedding_bits=16)
    for name, expected in quantized(wide, settings):
        found = model.get_submodule(name.removesuffix(".weight"))
        if isinstance(expected, QuantizedWeight):
            assert isinstance(found, QuantLinear)
            weight = found.to_weight()
            assert torch.equal(weight.q, expected.q)
            assert torch.equal(weight.scales, expected.scales)
        else:
            assert torch.equal(found.weight, expected)
    tokens = fixed_tokens(wide.config.vocab_size)
    expected_logits = logits(load_model(path, dequantize=True), tokens)
    error = (logits(model, tokens) - expected_logits).norm() / expected_logits.norm()
    assert error < 0.06  # the kernels quantise activations to int8


def test_only_the_embedding_stays_mapped(written: Path) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    model = load_model(written)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(written) in line]
    ranges = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in mapped]

    def is_mapped(tensor: Tensor) -> bool:
        return any(start <= tensor.data_ptr() < end for start, end in ranges)

    assert is_mapped(model.model.embed_tokens.weight)
    for module in model.modules():
        assert not isinstance(module, QuantLinear) or not is_mapped(module.tiles)


def test_looked_up_rows_do_not_stay_resident(wide: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    if not Path("/proc/self/smaps").exists():
        pytest.skip("needs /proc")

    def resident() -> int:
        """kB of the written file in memory."""
        text = Path("/proc/self/smaps").read_text()
        parts = [part for part in text.split("VmFlags:") if str(tmp_path) in part]
        return sum(int(line.split()[1]) for part in parts for line in part.splitlines() if "Rss:" in line)

    model = load_model(write(wide, tiny_tokenizer, tmp_path / "q"))
    embedding = model.model.embed_tokens
    expected = wide.model.embed_tokens.weight
    everything = torch.arange(len(expected))[None]
    assert torch.equal(embedding(everything), expected[None])
    assert resident() <= 128
    assert torch.equal(embedding(everything[:, :3]), expected[None, :3])
    for changed in (copy.deepcopy(embedding), copy.deepcopy(embedding).float()):  # files no more
        for _ in range(2):
            assert torch.equal(changed(everything).bfloat16(), expected[None])
    with torch.no_grad():  # written to, it is kept
        embedding.weight[5] = 1.0
    assert embedding(everything)[0, 5].eq(1).all()
    assert embedding(everything)[0, 5].eq(1).all()


def test_memory_that_is_no_file_is_left_alone(wide: Any) -> None:
    from xverse.formats.mapped import keep_in_file

    keep_in_file(wide.model.embed_tokens)
    assert type(wide.model.embed_tokens) is torch.nn.Embedding


def test_a_quantised_embedding_of_another_program(wide: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    settings = QuantSettings(bits=4, group_size=64, embedding_bits=8)
    save_quantized(quantized(wide, settings), wide.config, tiny_tokenizer, tmp_path / "q")
    model = load_model(tmp_path / "q", torch.float32)
    assert isinstance(model.model.embed_tokens, QuantEmbedding)
    tokens = fixed_tokens(wide.config.vocab_size)
    plain = load_model(tmp_path / "q", dequantize=True)
    assert torch.equal(model.model.embed_tokens(tokens), plain.model.embed_tokens(tokens))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the ``quantization_config`` of a directory."""
    values = json.loads((path / "config.json").read_text())
    change(values["quantization_config"])
    (path / "config.json").write_text(json.dumps(values))


def weights(config: dict[str, Any]) -> dict[str, Any]:
    return config["config_groups"]["group_1"]["weights"]


def test_what_other_programs_write_beside_it(written: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config |= {"version": "0.9.0", "sparsity_config": {}, "transform_config": {}, "ignore": ["x"]}
        more = {"actorder": "weight", "observer": "mse", "observer_kwargs": {}, "block_structure": None}
        weights(config).update(more)
        for group in config["config_groups"].values():
            group["format"] = "pack-quantized"

    expected = load_model(written, dequantize=True).state_dict()
    edit(written, change)
    found = load_model(written, dequantize=True).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_scales_in_float16_are_rounded(written: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    state = load_file(written / "model.safetensors")
    before = load_model(written, dequantize=True).get_submodule(name).weight
    state[f"{name}.weight_scale"] = (state[f"{name}.weight_scale"].float() * 1.003).half()
    save_file(state, written / "model.safetensors", {"format": "pt"})
    after = load_model(written, dequantize=True).get_submodule(name).weight
    stored = before * 1.003
    assert ((after - stored).abs() <= stored.abs() * (2**-8 + 2**-11)).all()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda c: c.update(quant_method="awq"), "quant_method 'awq'"),
        (lambda c: c.pop("quant_method"), "without quant_method"),
        (lambda c: c.update(format="float-quantized"), "the format 'float-quantized'"),
        (lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "a quantised cache"),
        (lambda c: c.update(transform_config={"x": 1}), "a transform"),
        (lambda c: c.update(sparsity_config={"format": "sparse-24-bitmask"}), "'sparse-24-bitmask'"),
        (lambda c: c.update(config_groups={}), "config_groups"),
        (lambda c: c["config_groups"]["group_1"].update(format="nvfp4-pack-quantized"), "nvfp4"),
        (lambda c: c["config_groups"]["group_1"].update(input_activations={"num_bits": 8}), "activations"),
        (lambda c: c["config_groups"]["group_1"].update(weights=None), "group_1 without weights"),
        (lambda c: weights(c).update(type="float"), "the weight type 'float'"),
        (lambda c: weights(c).update(symmetric=False), "asymmetric"),
        (lambda c: weights(c).update(dynamic=True), "dynamic"),
        (lambda c: weights(c).update(actorder="group"), "activation order"),
        (lambda c: weights(c).update(num_bits=3), "3 bits"),
        (lambda c: weights(c).update(strategy="block"), "the strategy 'block'"),
        (lambda c: weights(c).update(group_size=16), "group_size of 16"),
    ],
)
def test_schemes_that_are_refused(written: Path, change: Callable[[Any], object], part: str) -> None:
    edit(written, change)
    with pytest.raises(UserError) as caught:
        load_model(written)
    text = str(caught.value)
    assert part in text
    assert str(written / "config.json") in text
    assert "\n" not in text


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("suffix", "change", "part"),
    [
        ("weight_packed", lambda t: None, "unexpected"),
        ("weight_scale", lambda t: None, "weight_scale is missing"),
        ("weight_shape", lambda t: None, "weight_shape is missing"),
        (
            "weight_shape",
            lambda t: t.flip(0),
            "weight_shape is [128, 256], but config.json implies [256, 128]",
        ),
        ("weight_packed", lambda t: t[:-1].clone(), "weight_packed is int32 [255, 16]"),
        ("weight_packed", lambda t: t[:, :-1].clone(), "has 15 columns, not 16 for 4 bits or 32 for 8 bits"),
        ("weight_packed", lambda t: t.long(), "weight_packed is int64"),
        ("weight_packed", lambda t: t.flatten(), "weight_packed is int32 [4096]"),
        ("weight_scale", lambda t: t[:, :1].clone(), "has 1 groups, not 2"),
        ("weight_scale", lambda t: t[1:].clone(), "weight_scale is bfloat16 [255, 2]"),
        ("weight_scale", lambda t: t.int(), "weight_scale is int32"),
        ("weight_scale", lambda t: t.index_fill(0, torch.tensor([7]), torch.nan), "holds NaN"),
        ("weight_scale", lambda t: t.index_fill(0, torch.tensor([7]), torch.inf), "holds NaN or infinity"),
    ],
)
def test_damaged_tensors_are_named(
    written: Path, suffix: str, change: Callable[[Tensor], Tensor | None], part: str
) -> None:
    state = load_file(written / "model.safetensors")
    changed = change(state.pop(f"{NAME}.{suffix}"))
    if changed is not None:
        state[f"{NAME}.{suffix}"] = changed
    save_file(state, written / "model.safetensors", {"format": "pt"})
    for dequantize in (False, True):
        with pytest.raises(UserError) as caught:
            load_model(written, dequantize=dequantize)
        text = str(caught.value)
        assert part in text
        assert f"{NAME}." in text
        assert str(written) in text
        assert "\n" not in text


@pytest.mark.parametrize("suffix", ["weight", "weight_mean", "weight_scale_2", "input_scale", "qzeros"])
def test_other_tensors_of_a_matrix_are_not_overlooked(written: Path, suffix: str) -> None:
    state = load_file(written / "model.safetensors")
    for values in (torch.ones(4), torch.zeros(4)):  # what is 0 changes nothing
        state[f"{NAME}.{suffix}"] = values
        save_file(state, written / "model.safetensors", {"format": "pt"})
        for dequantize in (False, True):
            if values.any():
                with pytest.raises(UserError, match=rf"{written}: {NAME}\.{suffix} is unexpected"):
                    load_model(written, dequantize=dequantize)
            else:
                load_model(written, dequantize=dequantize)


def test_zero_points_are_refused_by_name(written: Path) -> None:
    state = load_file(written / "model.safetensors")
    state[f"{NAME}.weight_zero_point"] = torch.zeros(16, 2, dtype=torch.int32)
    save_file(state, written / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"{NAME}.weight_zero_point: zero points"):
        load_model(written)


@pytest.mark.parametrize("keep", [4, 1000, 0.7, 0.999])
def test_truncated(written: Path, keep: float) -> None:
    file = written / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match="truncated") as caught:
        load_model(written)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_matrix_of_no_layer(written: Path) -> None:
    state = load_file(written / "model.safetensors")
    for suffix in ("weight_packed", "weight_scale", "weight_shape"):
        state[f"model.layers.7.mlp.up_proj.{suffix}"] = state[f"{NAME}.{suffix}"].clone()
    save_file(state, written / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"unexpected model\.layers\.7\.mlp\.up_proj"):
        load_model(written)
