"""Adapters: trained in peft's format, beside the weights or in them, and never on a stranger's weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from xverse.cli import main
from xverse.config import UserError
from xverse.engine.engine import Engine
from xverse.engine.load import load_engine
from xverse.engine.request import Request
from xverse.finetune.methods import prepare
from xverse.finetune.settings import read_settings
from xverse.formats import ModelDirectory, load_model, load_tokenizer, save_hf
from xverse.formats.adapters import apply_adapter, differences, fingerprint, merge_and_logits, write_base
from xverse.formats.compare import fixed_tokens, logits
from xverse.formats.quantize import load_quantizing
from xverse.kernels.linear import QuantLinear
from xverse.model.transformer import XverseForCausalLM, init_weights

peft = pytest.importorskip("peft")


def merge_adapter(model: XverseForCausalLM, *where: Path) -> tuple[XverseForCausalLM, float, float]:
    """The merged model, and the difference of its logits from the unmerged adapter's."""
    after, before = merge_and_logits(model, *where)
    return after, *differences(before, logits(after, fixed_tokens(model.config.vocab_size)))


@pytest.fixture(params=["lora", "dora", "rslora"])
def adapter(request, document, flags, tmp_path) -> Path:
    document |= {"finetuning_type": "lora", "lora_rank": "4", "learning_rate": "1e-2", "bf16": "false"}
    if request.param != "lora":
        document[f"use_{request.param}"] = ""
    assert main(["finetune", *flags(document)]) == 0
    return tmp_path / "out"


def test_it_is_pefts_merges_and_talks(adapter, base, tmp_path, capsys) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, str(base))
    assert "lm_head" not in config["target_modules"]
    tokens = fixed_tokens(load_model(base).config.vocab_size)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    with torch.no_grad():
        expected = theirs(input_ids=tokens, use_cache=False).logits
    merged, difference, divergence = merge_adapter(load_model(base), adapter, base)
    assert difference < 1e-5
    assert divergence < 1e-9
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=1e-4, atol=1e-5)
    assert (expected - logits(load_model(base), tokens)).abs().max() > 1e-2, "it has learnt something"

    capsys.readouterr()
    words = ["--model", str(base), "--adapter", str(adapter)]
    assert main(["export", *words, "--format", "hf", "--out", str(tmp_path / "merged")]) == 0
    message = capsys.readouterr().out
    assert float(re.search(r"max \|Δlogit\| = (\S+), KL", message)[1]) < 1e-5
    torch.testing.assert_close(
        logits(load_model(tmp_path / "merged"), tokens), expected, rtol=1e-4, atol=1e-5
    )
    ask = ["--ask", "say hello", "--greedy", "--max-new-tokens", "8"]
    assert main(["chat", *words, *ask]) == 0
    reply = capsys.readouterr().out
    assert main(["chat", "--model", str(tmp_path / "merged"), *ask]) == 0
    assert capsys.readouterr().out == reply


def made(base: Path, out: Path, **values: Any) -> Path:
    """An adapter whose B is not zero, without training."""
    settings = read_settings(
        {"model_name_or_path": str(base), "output_dir": "o", "dataset": "d", "do_train": True, **values},
        "test",
    )
    torch.manual_seed(0)
    model = prepare(AutoModelForCausalLM.from_pretrained(base), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    model.save_pretrained(out)
    return out


def test_merging_into_sixteen_bits_says_what_it_costs(tiny_model, tiny_tokenizer, tmp_path) -> None:
    save_hf(tiny_model, tiny_tokenizer, tmp_path / "base", torch.bfloat16)
    path = made(tmp_path / "base", tmp_path / "adapter")
    stored = (tmp_path / "base" / "model.safetensors").read_bytes()
    merged, difference, divergence = merge_adapter(load_model(tmp_path / "base"), path)
    assert merged.lm_head.weight.dtype == torch.bfloat16
    assert 1e-5 < difference < 0.1
    assert 0 < divergence < 1e-3
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == stored


def test_an_adapter_of_other_weights_is_refused(base, tiny_model, tiny_tokenizer, tmp_path) -> None:
    path = made(base, tmp_path / "adapter")
    write_base(path, str(base), fingerprint(load_model(base)))
    apply_adapter(load_model(base), path, base)
    with torch.no_grad():
        tiny_model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    save_hf(tiny_model, tiny_tokenizer, tmp_path / "other", torch.float32)
    with pytest.raises(UserError, match=r"was trained on .*base, not on"):
        apply_adapter(load_model(tmp_path / "other"), path, tmp_path / "other")


def test_damaged_adapters_are_refused_in_one_line(base, tmp_path) -> None:
    path = made(base, tmp_path / "adapter")
    config, weights = path / "adapter_config.json", path / "adapter_model.safetensors"
    values, stored = json.loads(config.read_text()), weights.read_bytes()
    damaged: list[Any] = ["", "[1]", "{", {}, {**values, "peft_type": "X"}, {**values, "r": "x"}]
    damaged += [{**values, "r": 0}, {**values, "target_modules": ["nothing"]}, {**values, "r": 3}]
    for text in damaged:
        config.write_text(text if isinstance(text, str) else json.dumps(text))
        with pytest.raises(UserError, match=re.escape(str(path))) as caught:
            apply_adapter(load_model(base), path)
        assert "\n" not in str(caught.value)
    config.write_text(json.dumps(values))
    for data in (b"", stored[: len(stored) // 2], b"\xff" * 100):
        weights.write_bytes(data)
        with pytest.raises(UserError, match=re.escape(str(path))):
            apply_adapter(load_model(base), path)


def test_the_fingerprint_is_of_values_not_of_files(base, tmp_path, tiny_tokenizer) -> None:
    model = load_model(base)
    save_hf(model, tiny_tokenizer, tmp_path / "shards", torch.float32, max_shard_bytes=100_000)
    assert fingerprint(load_model(tmp_path / "shards")) == fingerprint(model)


def test_an_adapter_is_gone_on_with(base, document, flags, tmp_path) -> None:
    path = made(base, tmp_path / "adapter")
    document |= {"finetuning_type": "lora", "adapter_name_or_path": str(path), "learning_rate": "0"}
    assert main(["finetune", *flags(document)]) == 0
    first = merge_adapter(load_model(base), path)[0]
    second = merge_adapter(load_model(base), tmp_path / "out", base)[0]
    tokens = fixed_tokens(first.config.vocab_size)
    torch.testing.assert_close(logits(first, tokens), logits(second, tokens), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapter", "nowhere"], "no such adapter directory"),
        (["--adapter", "BASE"], "not an adapter directory"),
    ],
)
def test_mistakes_are_one_line(base, tmp_path, capsys, words, message) -> None:
    path = made(base, tmp_path / "adapter")
    words = [{"BASE": str(base), "ADAPTER": str(path)}.get(word, word) for word in words]
    assert main(["chat", "--model", str(base), "--ask", "hi", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def wide(wide_config: Any, tiny_tokenizer: Any, tmp_path: Path) -> Path:
    model = XverseForCausalLM(wide_config)
    init_weights(model, seed=0)
    save_hf(model, tiny_tokenizer, tmp_path / "wide", torch.float32)
    return tmp_path / "wide"


def prompt_logprobs(engine: Engine, tokens: torch.Tensor) -> torch.Tensor:
    """The engine's log-probabilities of the tokens [n, T] behind the first: [n, T - 1]."""
    rows = []
    for ids in tokens.tolist():
        (event,) = engine.stream(Request(prompt_ids=ids, prompt_logprobs=0, generate=False))
        rows.append([token.logprob for token in event.prompt_logprobs or ()][-len(ids) + 1 :])
    return torch.tensor(rows)


@pytest.mark.parametrize("stored", [False, True])
def test_beside_quantised_weights_an_adapter_keeps_its_precision(wide, tmp_path, capsys, stored) -> None:
    """Its product is exact: with B = 0 nothing changes, and with another B just what it adds."""
    source, extra = wide, {"quantize": "int4"}
    if stored:
        words = ["--model", str(wide), "--bits", "4", "--method", "rtn", "--out", str(tmp_path / "stored")]
        assert main(["quantize", *words]) == 0
        source, extra = tmp_path / "stored", {}
    path = made(source, tmp_path / "adapter")
    write_base(path, str(source), fingerprint(load_model(source)))
    tokens = fixed_tokens(load_model(wide).config.vocab_size)
    engine = load_engine(str(source), adapter=str(path), **extra).engine
    quantised = load_quantizing(wide, "int4", torch.float32, balance=False)
    merged = merge_adapter(load_quantized_plain(source, stored), path)[0]
    found = prompt_logprobs(engine, tokens)
    without, whole = (
        logits(model, tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        for model in (quantised, merged)
    )
    assert (found - whole).abs().max() < 0.25 * (without - whole).abs().max()
    capsys.readouterr()
    words = ["--model", str(source), "--adapter", str(path), "--ask", "say hello", "--max-new-tokens", "3"]
    assert main(["chat", *words, "--greedy", *(["--quantize", "int4"] if not stored else [])]) == 0
    # another base, by its hash
    with torch.no_grad():
        other = load_model(wide).to(torch.float32)
        other.load_state_dict({name: 1.01 * value for name, value in other.state_dict().items()}, assign=True)
    save_hf(other, load_tokenizer(wide), tmp_path / "other", torch.float32)
    words = ["--model", str(tmp_path / "other"), "--adapter", str(path), "--quantize", "int4", "--ask", "x"]
    assert main(["chat", *words]) == 2
    assert "was trained on" in capsys.readouterr().err


def load_quantized_plain(source: Path, stored: bool) -> XverseForCausalLM:
    """The weights that INT4 stands for, as plain numbers."""
    if stored:
        return load_model(source, dequantize=True).float()
    plain, quantised = load_model(source), load_quantizing(source, "int4", torch.float32, balance=False)
    for name, module in quantised.named_modules():
        if isinstance(module, QuantLinear):
            plain.get_submodule(name).weight = nn.Parameter(module.dequantize(torch.float32))
    return plain


@pytest.mark.parametrize("stored", [False, True])
def test_merged_and_quantised_again(wide, tmp_path, capsys, stored) -> None:
    source = wide
    if stored:
        assert main(["quantize", "--model", str(wide), "--bits", "8", "--out", str(tmp_path / "int8")]) == 0
        source = tmp_path / "int8"
    path = made(source, tmp_path / "adapter")
    write_base(path, str(source), fingerprint(load_model(source)))
    capsys.readouterr()
    words = ["--model", str(source), "--adapter", str(path), "--format", "hf", "--quantize", "int4"]
    assert main(["export", *words, "--out", str(tmp_path / "merged")]) == 0
    message = capsys.readouterr().out
    difference, divergence = re.search(r"parity: max \|Δlogit\| = (\S+), KL = (\S+) nats", message).groups()
    merged, before = merge_and_logits(load_model(source, dequantize=True), path)
    after = logits(load_model(tmp_path / "merged", dequantize=True), fixed_tokens(merged.config.vocab_size))
    expected = differences(before, after)
    assert (float(difference), float(divergence)) == pytest.approx(expected, rel=0.1)
    assert ModelDirectory.of(tmp_path / "merged").scheme is not None
    base, quantised = load_model(source, dequantize=True), load_quantized_plain(wide, False)
    tokens = fixed_tokens(base.config.vocab_size)
    assert expected[1] < 1.5 * differences(logits(base, tokens), logits(quantised, tokens))[1]
    for wrong in (["--quantize", "int4"], ["--quantize", "int4", "--adapter", str(path), "--type", "bf16"]):
        assert main(["export", "--model", str(source), "--format", "hf", "--out", "o", *wrong]) == 2
    assert "use xverse quantize" in capsys.readouterr().err
