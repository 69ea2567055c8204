"""Quantising layer by layer: the figures of two whole models, with one layer in memory at a time."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xverse.config import UserError
from xverse.kernels.linear import QuantEmbedding, QuantLinear
from xverse.kernels.weight import QuantizedWeight
from xverse.model import FullCausal, XverseForCausalLM
from xverse.quant.equalize import equalize_layer
from xverse.quant.layerwise import forward, input_rms, make_layer
from xverse.quant.quantizer import Quantizer, random_tokens
from xverse.quant.settings import METHODS, QuantSettings


class Reader:
    """Returns copies of a model's tensors and counts the elements of those that are still alive."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state, self.alive, self.most = state, weakref.WeakSet[Tensor](), 0

    def __call__(self, prefix: str) -> dict[str, Tensor]:
        gc.collect()
        copies = {name: tensor.clone() for name, tensor in self.state.items() if name.startswith(prefix)}
        for tensor in copies.values():
            self.alive.add(tensor)
        self.most = max(self.most, sum(tensor.numel() for tensor in self.alive))
        return copies


def _tokens(config: Any, rows: int, seed: int) -> Tensor:
    return torch.randint(config.vocab_size, (rows, 24), generator=torch.Generator().manual_seed(seed))


def _settings(method: str, bits: int = 4, **options: Any) -> QuantSettings:
    return QuantSettings(bits=bits, method=method, group_size=32, **options)  # type: ignore[arg-type]


def _run(model: XverseForCausalLM, settings: QuantSettings, state: Any = None, **options: Any) -> Any:
    if settings.method == "gptq":
        options.setdefault("calibration", _tokens(model.config, 8, 1))
    run = Quantizer(model.config, Reader(state or model.state_dict()), settings, **options)
    return dict(run.tensors()), run


def _whole(config: Any, tensors: Mapping[str, Tensor | QuantizedWeight]) -> XverseForCausalLM:
    with torch.device("meta"):
        model = XverseForCausalLM(config)
    for name, tensor in tensors.items():
        *path, child, _ = name.split(".")
        owner = model.get_submodule(".".join(path))
        if isinstance(tensor, Tensor):
            owner.get_submodule(child).weight = nn.Parameter(tensor, requires_grad=False)
        elif child == "embed_tokens":
            setattr(owner, child, QuantEmbedding.from_weight(tensor, torch.float32))
        else:
            setattr(owner, child, QuantLinear.from_weight(tensor))
    return model


@pytest.fixture
def model(tiny_model: XverseForCausalLM) -> XverseForCausalLM:
    """The tiny model with norms other than 1, so that folding them would show."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in tiny_model.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
    return tiny_model.requires_grad_(False)


def _inject(state: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    scaled = dict(state)
    consumers = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    pairs = {
        f"model.layers.{layer}.{norm}.weight": [f"model.layers.{layer}.{name}.weight" for name in names]
        for layer in range(2)
        for norm, names in consumers.items()
    }
    for norm, names in {**pairs, "model.norm.weight": ["lm_head.weight"]}.items():
        factors = torch.ones(len(state[norm]))
        factors[3::20] = factor
        scaled[norm] = state[norm] / factors
        for name in names:
            scaled[name] = state[name] * factors
    return scaled


@pytest.mark.parametrize("method", METHODS)
def test_report_is_that_of_two_whole_models(model: XverseForCausalLM, method: str) -> None:
    sample = _tokens(model.config, 5, 2)
    tensors, run = _run(model, _settings(method), sample=sample)
    assert list(tensors) == list(model.state_dict())
    quantized = _whole(model.config, tensors)
    context = FullCausal(*sample.shape)
    p = model(sample, context).log_softmax(-1)
    q = quantized(sample, context).log_softmax(-1)
    report = run.report
    assert report.tokens == sample.numel()
    assert report.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    assert report.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item(), abs=0.01)
    for logs, perplexity in ((p, report.perplexity_source), (q, report.perplexity_quantized)):
        expected = torch.nn.functional.nll_loss(logs[:, :-1].flatten(0, 1), sample[:, 1:].flatten()).exp()
        assert perplexity == pytest.approx(expected.item(), rel=1e-5)
    assert report.delta_perplexity == report.perplexity_quantized / report.perplexity_source - 1
    assert len(report.layer_errors) == 2
    assert all(0 < error < 0.3 for error in report.layer_errors)
    assert report.bytes_source == sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    expected_bytes = sum(
        tensor.numel() * tensor.itemsize
        if isinstance(tensor, Tensor)
        else tensor.q.numel() * tensor.bits // 8 + 2 * tensor.scales.numel()
        for tensor in tensors.values()
    )
    assert report.bytes_quantized == expected_bytes
    assert len(report.describe()) == 3


@pytest.mark.parametrize("method", METHODS)
def test_same_input_gives_the_same_tensors(model: XverseForCausalLM, method: str) -> None:
    first, _ = _run(model, _settings(method))
    second, run = _run(model, _settings(method), sample=_tokens(model.config, 2, 3))
    for name, tensor in first.items():
        other = second[name]
        if isinstance(tensor, QuantizedWeight):
            assert torch.equal(tensor.q, other.q)
            assert torch.equal(tensor.scales, other.scales)
        else:
            assert torch.equal(tensor, other)
    assert run.report.kl is not None


def test_settings_decide_bits_and_what_is_left(model: XverseForCausalLM) -> None:
    tensors, run = _run(model, _settings("rtn"))
    assert (tensors["lm_head.weight"].bits, tensors["model.embed_tokens.weight"].bits) == (8, 8)
    assert all(tensors[f"model.layers.1.mlp.{name}_proj.weight"].bits == 4 for name in ("gate", "up", "down"))
    assert run.report.kl is None
    assert run.report.describe()[1] == "parity not measured: no text was given"
    tensors, _ = _run(model, _settings("rtn-row"))
    assert torch.equal(tensors["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(tensors["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert torch.equal(tensors["model.norm.weight"], model.model.norm.weight)
    assert tensors["model.layers.0.self_attn.q_proj.weight"].scales.shape == (64, 1)
    tensors, _ = _run(model, _settings("rtn", head_bits=4, embedding_bits=4))
    assert (tensors["lm_head.weight"].bits, tensors["model.embed_tokens.weight"].bits) == (4, 4)


def test_source_is_not_changed(model: XverseForCausalLM) -> None:
    state = model.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    tensors = dict(state)
    run = Quantizer(
        model.config,
        lambda prefix: {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)},
        _settings("gptq"),
        calibration=_tokens(model.config, 8, 1),
        sample=_tokens(model.config, 2, 2),
    )
    for _ in run.tensors():
        pass
    assert all(torch.equal(before[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_balancing_a_layer_preserves_its_outputs(model: XverseForCausalLM, dtype: torch.dtype) -> None:
    config = model.config
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    prefix = "model.layers.1."
    layer = make_layer(config, 1, {name: tensor for name, tensor in state.items() if name.startswith(prefix)})
    x = torch.randn(3, 16, config.hidden_size, generator=torch.Generator().manual_seed(0))
    x[..., 7] *= 30
    before = forward(layer, config, x)
    weights = {name: value.clone() for name, value in layer.named_parameters()}
    balanced, divided = equalize_layer(layer, input_rms(layer, config, x))
    columns = weights["input_layernorm.weight"].float() / layer.input_layernorm.weight.float()
    values = weights["self_attn.v_proj.weight"] * columns / divided[:, None]
    torch.testing.assert_close(layer.self_attn.v_proj.weight, values, rtol=1e-4, atol=1e-6)
    assert layer.input_layernorm.weight.dtype == dtype
    torch.testing.assert_close(forward(layer, config, x), before, rtol=1e-5, atol=1e-5)
    measured = input_rms(layer, config, x)
    for name in ("qkv", "o", "gate_up"):
        torch.testing.assert_close(getattr(measured, name), getattr(balanced, name), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(measured.downs, balanced.downs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_rescaled_channels_do_not_change_the_result(model: XverseForCausalLM, method: str) -> None:
    sample = _tokens(model.config, 5, 2)
    injected = _inject(model.state_dict(), 32.0)
    torch.testing.assert_close(
        _whole(model.config, injected)(sample, FullCausal(*sample.shape)),
        model(sample, FullCausal(*sample.shape)),
    )
    plain, with_outliers = (
        _run(model, _settings(method, head_bits=4), state, sample=sample)[1].report
        for state in (None, injected)
    )
    assert with_outliers.kl == pytest.approx(plain.kl, rel=0.05)
    upstream = _run(model, _settings("rtn-row", head_bits=4), injected, sample=sample)[1].report
    assert with_outliers.kl < 0.1 * upstream.kl


def test_one_layer_at_a_time(model: XverseForCausalLM) -> None:
    reader = Reader(model.state_dict())
    settings = _settings("rtn")
    for _ in Quantizer(model.config, reader, settings, sample=_tokens(model.config, 2, 2)).tensors():
        pass
    largest = max(
        sum(tensor.numel() for name, tensor in model.state_dict().items() if name.startswith(prefix))
        for prefix in ("model.layers.0.", "lm_head.", "model.embed_tokens.")
    )
    assert reader.most <= largest + model.config.hidden_size


def test_progress_is_reported(model: XverseForCausalLM) -> None:
    steps: list[str] = []
    _run(model, _settings("rtn"), progress=steps.append)
    assert steps == ["embedding", "layer 1 of 2", "layer 2 of 2", "head"]


def test_random_tokens_are_always_the_same() -> None:
    assert torch.equal(random_tokens(700), random_tokens(700))
    assert random_tokens(700).max() < 700


def test_wrong_input_is_named(model: XverseForCausalLM) -> None:
    state = model.state_dict()
    with pytest.raises(UserError, match="bits: 5"):
        QuantSettings(bits=5)
    with pytest.raises(UserError, match="method: 'awq'"):
        QuantSettings(bits=4, method="awq")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="head_bits: 3"):
        QuantSettings(bits=4, head_bits=3)
    odd = dataclasses.replace(model.config, intermediate_size=80)
    with pytest.raises(UserError, match="none of 32, 64, 128 up to 128 divides the 80 inputs of a layer"):
        Quantizer(odd, Reader(state), QuantSettings(bits=4))
    with pytest.raises(UserError, match="gptq: needs calibration text"):
        Quantizer(model.config, Reader(state), _settings("gptq"))
    broken = dict(state)
    broken["model.layers.1.mlp.up_proj.weight"] = state["model.layers.1.mlp.up_proj.weight"].clone()
    broken["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    for method in METHODS:
        with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: holds NaN"):
            _run(model, _settings(method), broken)
