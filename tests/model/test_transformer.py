"""The model against transformers' Llama on the same weights, in float32."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from tests.scale import examples
from xverse.config import UserError
from xverse.model import (
    FullCausal,
    Packed,
    XverseConfig,
    XverseForCausalLM,
    init_weights,
    linear_cross_entropy,
    named_shape,
)

CONFIG = XverseConfig(
    vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4
)


@pytest.fixture(scope="module")
def models():
    ours = XverseForCausalLM(CONFIG)
    init_weights(ours, seed=0)
    with torch.no_grad():  # larger than the usual start, so that attention is not nearly uniform
        for parameter in ours.parameters():
            parameter.mul_(1.0 if parameter.dim() == 1 else 4.0)
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=4,
            rms_norm_eps=1e-6,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            pad_token_id=1,
        )
    )
    llama.load_state_dict(ours.state_dict())
    return ours.eval(), llama.eval()


def tokens_like(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 320, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_full_pass_equals_llama(models):
    ours, llama = models
    tokens = tokens_like(3, 50)
    torch.testing.assert_close(ours(tokens, FullCausal(3, 50)), llama(tokens).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_positions_beyond_8000_equal_llama(models):
    ours, llama = models
    tokens = tokens_like(1, 64)
    context = FullCausal(1, 64)
    context.positions = context.positions + 8100
    expected = llama(tokens, position_ids=context.positions).logits
    torch.testing.assert_close(ours(tokens, context), expected, atol=1e-4, rtol=0)


@torch.no_grad()
@settings(max_examples=examples(20), deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), rows=st.integers(1, 3))
def test_packed_documents_equal_each_alone(models, lengths, rows):
    ours, llama = models
    total = sum(lengths)
    tokens = tokens_like(rows, total, seed=total)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(rows, total)
    packed = ours(tokens, Packed(ids))
    for document, logits in zip(tokens.split(lengths, dim=1), packed.split(lengths, dim=1), strict=True):
        torch.testing.assert_close(logits, llama(document).logits, atol=1e-4, rtol=0)


def test_document_ids_may_differ_between_rows_and_repeat_across_them(models):
    ours, _ = models
    tokens = tokens_like(2, 6)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 2, 2, 2, 2]])
    context = Packed(ids)
    assert context.positions.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]]
    row = ours(tokens[1:, 2:], FullCausal(1, 4))
    torch.testing.assert_close(ours(tokens, context)[1:, 2:], row, atol=1e-5, rtol=0)


def test_named_shapes_have_the_published_sizes():
    sizes = {name: named_shape(name).num_parameters() for name in ("nano", "mini", "7b")}
    assert sizes == {"nano": 11_406_592, "mini": 38_281_728, "7b": 7_299_846_144}
    with torch.device("meta"):
        model = XverseForCausalLM(named_shape("7b"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_299_846_144
    assert len(list(model.parameters())) == 291
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]
    with pytest.raises(UserError, match="did you mean 'mini'"):
        named_shape("minni")


def test_config_refuses_what_the_model_is_not():
    good = CONFIG.to_json()
    assert XverseConfig.from_json(good) == CONFIG
    for change in ({"num_key_value_heads": 1}, {"rope_scaling": {"type": "longrope", "factor": 2.0}}):
        with pytest.raises(UserError, match=next(iter(change)).split("_")[0]):
            XverseConfig.from_json({**good, **change})
    with pytest.raises(UserError, match="heads"):
        XverseConfig.from_json({**good, "num_attention_heads": 5})


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_loss_equals_plain_cross_entropy(reduction, chunk):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 16, generator=generator, requires_grad=True)
    weight = torch.randn(90, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 90, (40,), generator=generator)
    targets[::5] = -100
    plain = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction=reduction) * 3
    expected = torch.autograd.grad(plain, (hidden, weight))
    ours = linear_cross_entropy(hidden, weight, targets, reduction=reduction, chunk=chunk) * 3
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad(ours, (hidden, weight)), expected)
    alone = linear_cross_entropy(hidden.detach(), weight, targets, reduction="sum", chunk=chunk)
    torch.testing.assert_close(torch.autograd.grad(alone * 2, weight)[0].shape, weight.shape)
    losses = linear_cross_entropy(hidden, weight, targets, reduction="none", chunk=chunk)
    assert losses[::5].abs().max() == 0
    torch.testing.assert_close(losses.sum(), linear_cross_entropy(hidden, weight, targets, reduction="sum"))


def test_loss_of_nothing_is_zero_and_has_zero_gradient():
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(10, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.full((4,), -100))
    loss.backward()
    assert loss == 0
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0
