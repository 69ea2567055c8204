"""Directories whose weights are indices into tables: written, read, damaged, and in transformers."""

from __future__ import annotations

import dataclasses
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
from xverse.formats.write import save_quantized
from xverse.hf import XverseForCausalLM as HubModel
from xverse.kernels.linear import QuantLinear
from xverse.kernels.weight import QuantizedWeight, table_of
from xverse.model import XverseForCausalLM, init_weights
from xverse.quant.quantizer import Quantizer
from xverse.quant.settings import QuantSettings

NAME = "model.layers.1.mlp.up_proj"
TABLE, CENTRES, NEAREST = (f"{NAME}.weight_{kind}" for kind in ("table", "centres", "nearest"))


@pytest.fixture(scope="module")
def wide(wide_config: Any) -> Any:
    model = XverseForCausalLM(wide_config)
    init_weights(model, seed=0)
    return model.bfloat16().eval()


def tensors(model: Any, bits: int) -> dict[str, Tensor | QuantizedWeight]:
    state = model.state_dict()
    settings = QuantSettings(bits=bits, group_size=64, head_bits=8, embedding_bits=16, table=True)

    def read(prefix: str) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}

    result = dict(Quantizer(model.config, read, settings).tensors())
    weight = result[f"{NAME}.weight"]
    assert isinstance(weight, QuantizedWeight)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, weight.q.shape[1], generator=generator).bfloat16() / 16
    nearest = torch.randint(3, weight.q.shape[:1], generator=generator).to(torch.uint8)
    return result | {f"{NAME}.weight": dataclasses.replace(weight, centres=centres, nearest=nearest)}


@pytest.fixture
def written(wide: Any, tiny_tokenizer: Any, tmp_path: Path) -> Path:
    save_quantized(tensors(wide, 4).items(), wide.config, tiny_tokenizer, tmp_path / "written")
    return tmp_path / "written"


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_reads_what_was_written(wide: Any, tiny_tokenizer: Any, tmp_path: Path, bits: int) -> None:
    expected = tensors(wide, bits)
    save_quantized(expected.items(), wide.config, tiny_tokenizer, tmp_path / "q", max_shard_bytes=60_000)
    stored = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert (stored["quant_method"], stored["format"]) == ("xverse", "table-quantized")
    model, plain = load_model(tmp_path / "q"), load_model(tmp_path / "q", dequantize=True)
    for name, weight in expected.items():
        if not isinstance(weight, QuantizedWeight):
            continue
        found = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(found, QuantLinear)
        again, table = found.to_weight(), None if name.startswith("lm_head") else table_of(bits)
        assert torch.equal(again.q, weight.q)
        assert torch.equal(again.scales, weight.scales)
        assert (again.table is None) == (table is None)
        if again.table is not None and table is not None:
            assert torch.equal(again.table, table)
        assert (again.centres is None) == (weight.centres is None) == (name != f"{NAME}.weight")
        if again.centres is not None and weight.centres is not None:
            assert again.nearest is not None
            assert weight.nearest is not None
            assert torch.equal(again.centres, weight.centres)
            assert torch.equal(again.nearest, weight.nearest)
            x = torch.randn(3, found.in_features, generator=torch.Generator().manual_seed(0))
            central = (x @ weight.centres.float().T)[:, weight.nearest.long()]
            without = QuantLinear.from_weight(dataclasses.replace(weight, centres=None, nearest=None))
            torch.testing.assert_close(found(x) - central, without(x))
            assert torch.equal(found(x)[1:2], found(x[1:2]))  # bit for bit the row alone
            gradient = x.clone().requires_grad_()
            torch.testing.assert_close(found(gradient), x @ weight.dequantize().T)
        assert torch.equal(plain.get_parameter(name), weight.dequantize())
    tokens = fixed_tokens(wide.config.vocab_size)
    reference = logits(plain, tokens)
    assert (logits(model, tokens) - reference).norm() < 0.06 * reference.norm()  # activations are rounded


def test_transformers_reads_and_writes_tables(wide: Any, written: Path, tmp_path: Path) -> None:
    model = HubModel.from_pretrained(written, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (written, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    again = load_model(tmp_path / "again")
    tokens = fixed_tokens(wide.config.vocab_size)
    assert torch.equal(logits(again, tokens), logits(load_model(written), tokens))


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        (TABLE, lambda table: None, "weight_table is missing"),
        (TABLE, lambda table: table.int(), "weight_table is int32 [16], not int8 [16]"),
        (TABLE, lambda table: table[:8].clone(), "weight_table is int8 [8], not int8 [16]"),
        (TABLE, lambda table: table.flip(0), "weight_table is not in ascending order"),
        (TABLE, lambda table: table.clamp(-50, 50), "weight_table is not in ascending order"),
        (CENTRES, lambda centres: None, "weight_centres is missing"),
        (CENTRES, lambda rows: rows.int(), "weight_centres is int32 [3, 128], not floats with 128 columns"),
        (CENTRES, lambda rows: rows[:, :64].clone(), "weight_centres is bfloat16 [3, 64], not floats with"),
        (CENTRES, lambda centres: centres / 0, "weight_centres holds NaN or infinity"),
        (CENTRES, lambda centres: centres[:1].clone(), "weight_nearest holds 2, but there are 1 centres"),
        (NEAREST, lambda nearest: None, "weight_nearest is missing"),
        (NEAREST, lambda nearest: nearest.short(), "weight_nearest is int16 [256], not uint8 [256]"),
        (NEAREST, lambda nearest: nearest[:64].clone(), "weight_nearest is uint8 [64], not uint8 [256]"),
    ],
)
def test_damaged_tables_are_named(
    written: Path, name: str, change: Callable[[Tensor], Tensor | None], part: str
) -> None:
    state = load_file(written / "model.safetensors")
    changed = change(state.pop(name))
    if changed is not None:
        state[name] = changed
    save_file(state, written / "model.safetensors", {"format": "pt"})
    for dequantize in (False, True):
        with pytest.raises(UserError) as caught:
            load_model(written, dequantize=dequantize)
        assert f"{NAME}.{part}" in str(caught.value)
        assert str(written) in str(caught.value)


def test_a_table_that_the_configuration_does_not_announce(written: Path) -> None:
    file = written / "config.json"
    file.write_text(file.read_text().replace('"type": "table"', '"type": "int"'))
    with pytest.raises(UserError, match=r"weight_table is not announced in config\.json"):
        load_model(written)


def test_other_programs_formats_have_no_tables(written: Path) -> None:
    file = written / "config.json"
    text = file.read_text().replace('"quant_method": "xverse"', '"quant_method": "compressed-tensors"')
    file.write_text(text.replace("table-quantized", "pack-quantized"))
    with pytest.raises(UserError, match=r"the weight type 'table' of group_\d is not supported"):
        load_model(written)
