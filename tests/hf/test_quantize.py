"""``model.quantize`` and quantised directories through transformers, without compressed-tensors' package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from xverse.config import UserError
from xverse.formats import load_model, load_tokenizer, logits, save_hf
from xverse.formats.compare import fixed_tokens
from xverse.kernels.linear import QuantLinear
from xverse.model import XverseForCausalLM, init_weights
from xverse.quant.text import loading_calibration

MESSAGES = [{"role": "user", "content": "你好"}]


@pytest.fixture(scope="module")
def directory(wide_config: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dimensions divisible by 128, written by xverse."""
    model = XverseForCausalLM(wide_config)
    init_weights(model, seed=0)
    path = tmp_path_factory.mktemp("plain") / "model"
    generation = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "max_new_tokens": 8}
    save_hf(model, tiny_tokenizer, path, torch.bfloat16, generation)
    return path


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``AutoModelForCausalLM.from_pretrained`` without compressed-tensors installed."""
    from transformers import AutoModelForCausalLM

    import xverse  # noqa: F401

    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    return AutoModelForCausalLM.from_pretrained


def linears(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize(
    ("bits", "options", "head"),
    [(8, {}, 8), (4, {}, 8), (4, {"group_size": 32}, 8), (4, {"method": "rtn-row"}, None)],
)
def test_in_place(
    directory: Path, load: Callable[..., Any], bits: int, options: dict[str, Any], head: int | None
) -> None:
    model = load(directory, torch_dtype=torch.bfloat16)
    tokens = fixed_tokens(model.config.vocab_size)
    before = logits(model, tokens)
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert model.quantize(bits, **options) is model
    found = linears(model)
    assert {layer.bits for name, layer in found.items() if name != "lm_head"} == {bits}
    assert (found["lm_head"].bits if head else None) == head
    assert len(found) == 14 + bool(head)
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) < 0.8 * stored
    assert not any(parameter.requires_grad for parameter in model.parameters())
    error = (logits(model, tokens) - before).norm() / before.norm()
    assert error < (0.06 if bits == 8 else 0.5)


def test_saved_and_loaded_again(directory: Path, load: Callable[..., Any], tmp_path: Path) -> None:
    model = load(directory).quantize(4)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.is_quantized
    assert again.dtype == torch.bfloat16
    assert len(linears(again)) == 15
    tokens = fixed_tokens(model.config.vocab_size)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert torch.equal(logits(load_model(tmp_path / "saved"), tokens), logits(model, tokens))
    again.save_pretrained(tmp_path / "third")
    assert torch.equal(logits(load(tmp_path / "third"), tokens), logits(model, tokens))
    again.config.save_pretrained(tmp_path / "config")
    assert '"quant_method": "compressed-tensors"' in (tmp_path / "config" / "config.json").read_text()
    with pytest.raises(UserError, match="already quantised"):
        again.quantize(8)


def test_the_same_as_the_command_line(
    directory: Path, load: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from xverse.cli import main

    words = ["--model", str(directory), "--bits", "4", "--method", "rtn", "--levels", "integers"]
    assert main(["quantize", *words, "--out", str(tmp_path / "q")]) == 0
    capsys.readouterr()
    calibration = loading_calibration(load_tokenizer(directory))
    by_command, in_place = load(tmp_path / "q"), load(directory).quantize(4, calibration=calibration)
    tokens = fixed_tokens(by_command.config.vocab_size)
    assert torch.equal(logits(by_command, tokens), logits(in_place, tokens))


def test_chat_generate_and_loss(directory: Path, load: Callable[..., Any], hf_tokenizer: Any) -> None:
    model = load(directory).quantize(8)
    assert isinstance(model.chat(hf_tokenizer, MESSAGES), str)
    assert isinstance("".join(model.chat(hf_tokenizer, MESSAGES, stream=True)), str)
    ids = torch.tensor([[2, 5, 6, 7]])
    beams = model.generate(ids, num_beams=2, do_sample=False, max_new_tokens=4)
    assert beams.shape[1] <= 8
    plain = load(directory)
    loss, expected = (each(input_ids=ids, labels=ids).loss.item() for each in (model, plain))
    assert loss == pytest.approx(expected, rel=0.02)


def test_gptq_learns_from_calibration(directory: Path, load: Callable[..., Any]) -> None:
    calibration = torch.randint(4, 600, (4, 64), generator=torch.Generator().manual_seed(0))
    model = load(directory).quantize(4, method="gptq", calibration=calibration)
    assert len(linears(model)) == 15
    with pytest.raises(UserError, match="calibration"):
        load(directory).quantize(4, method="gptq")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"bits": 5}, "bits: 5 is not supported; 8, 4, 3 or 2"),
        ({"bits": 16}, "bits: 16"),
        ({"bits": 4, "method": "awq"}, "awq"),
        ({"bits": 4, "group_size": 100}, "group_size: 100"),
    ],
)
def test_settings_that_are_refused(
    directory: Path, load: Callable[..., Any], arguments: dict[str, Any], part: str
) -> None:
    model = load(directory)
    with pytest.raises(UserError) as caught:
        model.quantize(**arguments)
    assert part in str(caught.value)
    assert not linears(model)


def test_a_group_that_does_not_divide_becomes_smaller(hf_model: Any) -> None:
    hf_model.quantize(4)
    assert {layer.group_size for layer in linears(hf_model).values()} == {64, 128}  # of 64 and 128 inputs


def test_an_adapter_is_named(directory: Path, load: Callable[..., Any]) -> None:
    class Adapted(nn.Linear):
        pass

    model = load(directory)
    model.lm_head.__class__ = Adapted
    with pytest.raises(UserError, match="lm_head is not a plain linear"):
        model.quantize(4)


def test_half_and_float_are_refused_as_transformers_does(directory: Path, load: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="not supported for quantized"):
        load(directory).quantize(4).half()


def test_a_damaged_tensor_is_named(directory: Path, load: Callable[..., Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    load(directory).quantize(4).save_pretrained(tmp_path / "q")
    state = load_file(tmp_path / "q" / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight_scale"].fill_(torch.nan)
    save_file(state, tmp_path / "q" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight_scale holds NaN"):
        load(tmp_path / "q")


def test_other_quantisation_is_left_to_transformers(directory: Path) -> None:
    from xverse.hf import XverseConfig as HfConfig

    stored = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert HfConfig(quantization_config=stored).quantization_config == stored
