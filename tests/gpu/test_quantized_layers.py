"""Quantised layers on CUDA against the dequantised weight."""

from __future__ import annotations

import pytest
import torch

from xverse.kernels.linear import QuantLinear
from xverse.quant.methods import rtn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_products(bits: int, group_size: int, tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = rtn(torch.randn(203, 256, generator=generator), bits, group_size)
    layer = QuantLinear.from_weight(weight).cuda()
    x = torch.randn(2, tokens, 256, generator=generator).to(dtype)
    expected = x.double() @ weight.dequantize().double().T
    found = layer(x.cuda()).cpu()
    assert found.shape == (2, tokens, 203)
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_several_of_one_input_and_back_to_the_cpu(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [rtn(torch.randn(rows, 256, generator=generator), bits, 128) for rows in (64, 96)]
    layers = [QuantLinear.from_weight(weight).cuda() for weight in weights]
    x = torch.randn(3, 256, generator=generator).bfloat16().cuda()
    for layer, found in zip(layers, QuantLinear.together(layers, x), strict=True):
        assert torch.equal(found, layer(x))
    for layer, weight in zip(layers, weights, strict=True):
        assert torch.equal(layer.cpu().to_weight().q, weight.q)


def test_whole_model_on_the_gpu(tiny_tokenizer, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    import xverse  # noqa: F401
    from xverse.formats import logits, save_hf
    from xverse.formats.compare import fixed_tokens
    from xverse.model import XverseConfig, XverseForCausalLM, init_weights

    config = XverseConfig(
        vocab_size=tiny_tokenizer.vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    source = XverseForCausalLM(config)
    init_weights(source, seed=0)
    save_hf(source, tiny_tokenizer, tmp_path / "model", torch.bfloat16)
    tokens = fixed_tokens(config.vocab_size)
    for bits in (8, 4):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
        on_cpu = logits(model.quantize(bits), tokens)
        on_gpu = logits(model.cuda(), tokens)
        assert (on_gpu - on_cpu).norm() <= 0.06 * on_cpu.norm()
        model.save_pretrained(tmp_path / f"saved-{bits}")
        placed = AutoModelForCausalLM.from_pretrained(tmp_path / f"saved-{bits}", device_map="cuda")
        assert placed.lm_head.tiles.is_cuda
        assert torch.equal(logits(placed, tokens), on_gpu)
