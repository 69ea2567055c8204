"""The rotation of the residual stream: orthogonal, and invisible from outside."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from xverse.model import FullCausal, XverseConfig, XverseForCausalLM
from xverse.model.transformer import init_weights
from xverse.quant.quantizer import Quantizer
from xverse.quant.rotate import rotated
from xverse.quant.settings import default_settings
from xverse.quant.tuning import whole_model

CONFIG = XverseConfig(
    vocab_size=96, hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3
)


@pytest.mark.parametrize("size", [1, 3, 32, 96, 576, 4096])
def test_the_rotation_is_orthogonal_and_mixes_all_channels(size: int) -> None:
    x = torch.randn(4, size, generator=torch.Generator().manual_seed(0))
    y = rotated(x)
    assert torch.allclose(x @ x.T, y @ y.T, rtol=1e-4, atol=1e-3)
    one = torch.zeros(size)
    one[size // 2] = 1.0
    power = size & -size
    assert rotated(one).abs().max() <= power**-0.5 + 1e-6


def _model(config: XverseConfig) -> XverseForCausalLM:
    model = XverseForCausalLM(config)
    init_weights(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms that do not commute with a rotation, and biases
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        else:  # logits that differ
            parameter.data.mul_(4)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "output_bias": True, "num_key_value_heads": 1},
        {"qk_norm": True, "head_dim": 64},
    ],
)
@torch.no_grad()
def test_a_rotated_model_computes_the_same(changes: Mapping[str, int | bool]) -> None:
    model = _model(dataclasses.replace(CONFIG, **changes))
    state = model.state_dict()
    tokens = torch.arange(96).view(2, 48)

    def read(prefix: str) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}

    run = Quantizer(model.config, read, default_settings(4), calibration=tokens, sample=tokens)
    context = FullCausal(*tokens.shape)
    expected, source = model(tokens, context), run.whole_source()
    assert torch.allclose(source(tokens, context), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(source.model.embed_tokens.weight, model.model.embed_tokens.weight, atol=1e-3)
    # The quantised model is that of the report, which reads the source in the same basis.
    quantised = whole_model(model.config, dict(run.tensors()))
    log_p, log_q = (one(tokens, context).log_softmax(-1) for one in (model, quantised))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert kl == pytest.approx(run.report.kl, rel=0.05)
    assert 1e-5 < kl < 0.1
