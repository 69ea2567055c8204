"""Bits per weight on average: measured sensitivities, the choice of formats, wrong input."""

from __future__ import annotations

import math

import pytest
import torch

from xverse.config import UserError
from xverse.model import FullCausal, XverseForCausalLM
from xverse.quant.gptq import Hessian, HessianFactor, gptq
from xverse.quant.methods import rtn
from xverse.quant.mixing import (
    Unit,
    candidates,
    choose_formats,
    describe_mix,
    measure,
    measure_units,
    parse_bits,
    rounding_cost,
)
from xverse.quant.settings import QuantSettings


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "-4", "0", "4,5", "1.99", "8.6", "99"])
def test_what_is_not_a_number_of_bits(text: str) -> None:
    with pytest.raises(UserError, match=r"expected bits per weight, such as 4\.5"):
        parse_bits(text)


def test_groups_divide_the_inputs() -> None:
    assert candidates(576, table=False) == [(4, 64), (4, 32), (8, 64)]
    assert candidates(1536, table=False) == [(4, 128), (4, 64), (4, 32), (8, 128)]
    assert candidates(96) == [(2, 32), (3, 32), (4, 32), (8, 32)]
    sizes = [bits + 16 / group for bits, group in candidates(1536)]
    assert sizes == sorted(sizes)


def _unit(name: str, costs: tuple[float, ...]) -> Unit:
    return Unit((name,), ((4, 128), (4, 32), (8, 128)), (100.0, 110.0, 200.0), costs)


def test_bits_go_where_they_save_most() -> None:
    units = [_unit("a", (8.0, 7.0, 0.1)), _unit("b", (1.0, 0.1, 0.0)), _unit("c", (0.1, 0.09, 0.0))]
    chosen = choose_formats(units, 8 * 410 / 600, 600)
    assert chosen == {"a": (8, 128), "b": (4, 32), "c": (4, 128)}
    assert describe_mix(chosen) == (
        "1 with 4 bits in groups of 32, 1 with 4 bits in groups of 128, 1 with 8 bits in groups of 128"
    )
    assert set(choose_formats(units, 4.0, 600).values()) == {(4, 128)}
    assert set(choose_formats(units, 8.0, 600).values()) == {(8, 128)}
    for bits in (3.99, 8.1):
        with pytest.raises(UserError, match=r"this model takes 4\.000 to 8\.000 bits per weight"):
            choose_formats(units, bits, 600)


def test_the_message_names_an_average_that_is_accepted() -> None:
    units = [_unit("a", (1.0, 0.5, 0.1))]
    with pytest.raises(UserError) as refused:
        choose_formats(units, 1.0, 193, 7.0)
    least = float(str(refused.value).split("takes ")[1].split(" ")[0])
    assert set(choose_formats(units, least, 193, 7.0).values()) == {(4, 128)}


def test_predicted_cost_is_that_of_rounding_one_matrix(tiny_model: XverseForCausalLM) -> None:
    model = tiny_model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(3 if parameter.dim() == 2 else 1)  # logits that differ, so that KL exceeds the noise
    rows = torch.randint(model.config.vocab_size, (48, 32), generator=torch.Generator().manual_seed(0))
    sensitivities = measure(model, rows)
    context = FullCausal(*rows.shape)
    before = model(rows, context).log_softmax(-1)
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.v_proj"):
        linear = model.get_submodule(name)
        weight = linear.weight.clone()
        predicted = rounding_cost(weight, (4, 32), sensitivities[name])
        linear.weight.copy_(rtn(weight, 4, 32, sensitivities[name].inputs).dequantize())
        after = model(rows, context).log_softmax(-1)
        measured = (before.exp() * (before - after)).sum(-1).mean().item()
        linear.weight.copy_(weight)
        assert math.isclose(predicted, measured, rel_tol=0.8), (name, predicted, measured)


def test_outer_products_of_gradients_have_their_squares_on_the_diagonal(
    tiny_model: XverseForCausalLM,
) -> None:
    rows = torch.randint(tiny_model.config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    squares, outer = (measure(tiny_model.requires_grad_(False), rows, kind) for kind in (False, True))
    assert {name.rpartition(".")[2] for name in outer} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "down_proj",
    }
    for name, found in outer.items():
        torch.testing.assert_close(found.gradients.diagonal(), squares[name].gradients, rtol=1e-4, atol=1e-9)
        assert torch.equal(found.inputs, squares[name].inputs)


def test_the_share_of_errors_that_feedback_leaves(tiny_model: XverseForCausalLM) -> None:
    model = tiny_model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(model.config.vocab_size, (48, 32), generator=generator)
    squares, found = measure(model, rows), measure(model, rows, feedback=True)
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"):
        torch.testing.assert_close(found[name].inputs, squares[name].inputs)
        module = model.get_submodule(name)
        hessian = Hessian(module.in_features)
        hook = module.register_forward_pre_hook(lambda _, inputs, to=hessian: to.add(inputs[0]))
        model(rows, FullCausal(*rows.shape))
        hook.remove()
        weight = torch.randn(256, module.in_features, generator=generator)
        plain = rtn(weight, 4, 32, found[name].inputs)
        errors = [
            (weight - w.dequantize()) for w in (gptq(weight, 4, 32, HessianFactor(hessian.mean)), plain)
        ]
        left, without = ((error @ hessian.mean * error).sum().item() for error in errors)
        assert math.isclose(left / without, found[name].left, rel_tol=0.25), name
        assert squares[name].left == 1.0
    attention = [found[f"model.layers.0.self_attn.{kind}_proj"].left for kind in "qkv"]
    assert attention[0] == attention[1] == attention[2] < 1


def test_every_matrix_gets_a_format(tiny_model: XverseForCausalLM) -> None:
    model = tiny_model.requires_grad_(False)
    rows = torch.randint(model.config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    weights = {name: model.get_submodule(name).weight for name in names}
    units = measure_units(model.config, measure(model, rows), weights, QuantSettings(bits=4))
    assert sorted(name for unit in units for name in unit.names) == sorted(names)
    assert all(unit.costs[0] > unit.costs[-1] > 0 for unit in units)
    assert all(
        first < second for unit in units for first, second in zip(unit.sizes, unit.sizes[1:], strict=False)
    )
