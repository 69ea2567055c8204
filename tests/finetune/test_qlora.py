"""Adapters on quantised weights: gradients as through the plain weights they stand for, near LoRA's loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from xverse.cli import main
from xverse.formats import load_model, save_hf
from xverse.formats.adapters import differences, merge_and_logits
from xverse.formats.compare import fixed_tokens, logits
from xverse.kernels.linear import QuantLinear
from xverse.model.transformer import XverseForCausalLM, init_weights
from xverse.quant.methods import rtn
from xverse.train.plot import read_metrics

pytest.importorskip("peft")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_weight_it_stands_for(bits, dtype) -> None:
    torch.manual_seed(0)
    weight = rtn(torch.randn(200, 256), bits, 128)
    layer = QuantLinear.from_weight(weight)
    plain = nn.Linear(256, 200, bias=False).to(dtype)
    plain.weight.data = weight.dequantize(dtype)
    x = torch.randn(3, 5, 256).to(dtype)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    grad = torch.randn(3, 5, 200).to(dtype)
    layer(one).backward(grad)
    plain(two).backward(grad)
    torch.testing.assert_close(one.grad, two.grad)


def last(out: Path) -> float:
    return [r["valid"]["all"] for r in read_metrics(out / "metrics.jsonl") if "valid" in r][-1]


def test_it_learns_as_lora_does_and_merges(
    wide_config: Any, tiny_tokenizer, document, flags, tmp_path
) -> None:
    model = XverseForCausalLM(wide_config)
    init_weights(model, seed=0)
    save_hf(model, tiny_tokenizer, tmp_path / "wide", torch.float32)
    document |= {"model_name_or_path": str(tmp_path / "wide"), "finetuning_type": "lora", "bf16": "false"}
    document |= {"learning_rate": "1e-2", "val_size": "8", "num_train_epochs": "4"}
    lora = {**document, "output_dir": str(tmp_path / "lora")}
    assert main(["finetune", *flags(lora)]) == 0
    for name, extra in (("int4", {"quantization_bit": "4"}), ("again", {})):
        out = {"output_dir": str(tmp_path / name)}
        if name == "again":
            words = [
                "--model",
                str(tmp_path / "wide"),
                "--bits",
                "4",
                "--method",
                "rtn",
                "--out",
                str(tmp_path / "stored"),
            ]
            assert main(["quantize", *words]) == 0
            extra = {"model_name_or_path": str(tmp_path / "stored")}
        assert main(["finetune", *flags({**document, **out, **extra})]) == 0
        assert last(tmp_path / name) == pytest.approx(last(tmp_path / "lora"), abs=0.06)  # of 6.6 at first
    merged, before = merge_and_logits(load_model(tmp_path / "wide"), tmp_path / "int4", tmp_path / "wide")
    assert differences(before, logits(merged, fixed_tokens(merged.config.vocab_size)))[0] < 1e-4


def test_quantised_weights_learn_with_adapters_only(document, flags, capsys) -> None:
    assert main(["finetune", *flags({**document, "quantization_bit": "4"})]) == 2
    assert "needs finetuning_type lora" in capsys.readouterr().err
