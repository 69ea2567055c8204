"""Refining scales and norms from end to end: less divergence, the same integers, exact gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from xverse.kernels.weight import QuantizedWeight
from xverse.model import XverseForCausalLM
from xverse.quant import tuning
from xverse.quant.parity import compare
from xverse.quant.quantizer import Quantizer
from xverse.quant.settings import QuantSettings, default_settings
from xverse.quant.tuning import refine, whole_model


@pytest.fixture
def source(tiny_model: XverseForCausalLM) -> XverseForCausalLM:
    for parameter in tiny_model.requires_grad_(False).parameters():
        parameter.mul_(3 if parameter.dim() == 2 else 1)  # logits that differ
    return tiny_model


def _rows(source: XverseForCausalLM, seed: int, count: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(source.config.vocab_size, (count, 32), generator=generator)


def _quantized(source: XverseForCausalLM, settings: QuantSettings, **options: Any) -> Quantizer:
    state = source.state_dict()

    def read(prefix: str) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}

    return Quantizer(source.config, read, settings, **options)


def test_divergence_falls_and_integers_stay(source: XverseForCausalLM) -> None:
    settings = QuantSettings(bits=4, method="gptq", group_size=32, head_bits=4, embedding_bits=16)
    before = dict(_quantized(source, settings, calibration=_rows(source, 1)).tensors())
    steps: list[str] = []
    after = refine(before, source, _rows(source, 1), steps.append, steps=6)
    assert len(steps) == 6
    assert list(after) == list(before)
    for name, tensor in before.items():
        other = after[name]
        assert type(other) is type(tensor)
        if isinstance(tensor, QuantizedWeight) and isinstance(other, QuantizedWeight):
            assert torch.equal(tensor.q, other.q)
            assert not torch.equal(tensor.scales, other.scales)
            torch.testing.assert_close(tensor.scales, other.scales, rtol=0.05, atol=1e-4)
    held_out = _rows(source, 2)
    divergences = [
        compare(source, whole_model(source.config, tensors), held_out).report().kl
        for tensors in (before, after)
    ]
    assert divergences[1] < divergences[0]


def test_the_report_is_that_of_the_refined_model(
    source: XverseForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "STEPS", 2)
    sample = _rows(source, 3, 4)
    settings = dataclasses.replace(default_settings(4, group_size=32), refine=True)
    run = _quantized(source, settings, calibration=_rows(source, 1, 8), sample=sample)
    tensors = dict(run.tensors())
    expected = compare(source, whole_model(source.config, tensors), sample).report()
    # The report's source is rotated, in float32.
    assert run.report.kl == pytest.approx(expected.kl, rel=1e-4)
    assert len(run.report.layer_errors) == source.config.num_hidden_layers
    assert run.report.bytes_quantized < run.report.bytes_source
