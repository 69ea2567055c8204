"""Products of bfloat16 matrices by conversion to float32, compared with float64 and with PyTorch's own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.testing import assert_close

from xverse.kernels import bfloat16

HALF = torch.bfloat16
ULP = 2.0**-8  # half a unit in the last place, relative: what one rounding may change


@pytest.fixture(autouse=True)
def converting() -> Iterator[None]:
    """Products are converted, also where PyTorch has fast ones."""
    registered = bfloat16.register()
    yield
    registered._destroy()


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape))).to(HALF)


# Every overload that is replaced, as a function of its operands and of a tensor for the result.
CALLS: dict[str, Callable[..., Tensor]] = {
    "mm": lambda c, a, b, out: torch.mm(a, b),
    "mm.out": lambda c, a, b, out: torch.mm(a, b, out=out),
    "addmm": lambda c, a, b, out: torch.addmm(c, a, b, beta=0.5, alpha=2),
    "addmm.out": lambda c, a, b, out: torch.addmm(c, a, b, beta=0.5, alpha=2, out=out),
    "addmm_": lambda c, a, b, out: c.clone().addmm_(a, b, beta=0.5, alpha=2),
    "bmm": lambda c, a, b, out: torch.bmm(a, b),
    "bmm.out": lambda c, a, b, out: torch.bmm(a, b, out=out),
    "baddbmm": lambda c, a, b, out: torch.baddbmm(c, a, b, beta=0.5, alpha=2),
    "baddbmm.out": lambda c, a, b, out: torch.baddbmm(c, a, b, beta=0.5, alpha=2, out=out),
    "baddbmm_": lambda c, a, b, out: c.clone().baddbmm_(a, b, beta=0.5, alpha=2),
}


def test_every_replaced_overload_is_called_below() -> None:
    names = {name.partition(".")[0].removesuffix("_") for name in CALLS}
    assert names == bfloat16._PRODUCTS.keys()


@pytest.mark.parametrize("part", [2**22, 40])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 7, 3), (8, 16, 33), (3, 0, 2), (0, 4, 2)])
@pytest.mark.parametrize("name", CALLS)
def test_products_are_rounded_once(
    name: str, sizes: tuple[int, int, int], part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bfloat16, "_PART", part)  # small: several parts of rows, columns and batches
    rows, inner, columns = sizes
    batch = (3,) if "bmm" in name else ()
    c, a, b = random(*batch, rows, columns), random(*batch, rows, inner), random(*batch, inner, columns)
    exact = a.double() @ b.double()
    if "add" in name:
        exact = 0.5 * c.double() + 2 * exact
    for left, right in ((a, b), (a.mT.contiguous().mT, b.mT.contiguous().mT)):
        out = torch.empty(*batch, rows, columns, dtype=HALF)
        result = CALLS[name](c, left, right, out)
        assert result.dtype == HALF
        if ".out" in name:
            assert result.data_ptr() == out.data_ptr()
        assert_close(result.double(), exact, rtol=ULP, atol=1e-6)


def test_linear_broadcasts_its_bias_and_adds_before_rounding() -> None:
    x, weight, bias = random(2, 3, 64), random(5, 64), random(5)
    exact = linear(x.double(), weight.double(), bias.double())
    assert_close(linear(x, weight, bias).double(), exact, rtol=ULP, atol=1e-6)


def test_other_types_and_mistakes_reach_pytorch() -> None:
    a, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    assert_close(a @ b, (a[:, :, None] * b).sum(1))
    with pytest.raises(RuntimeError, match="dtype"):
        torch.mm(a.to(HALF), b.float())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        torch.mm(random(3, 4), random(3, 4))
    with pytest.raises(RuntimeError, match="batch"):
        torch.bmm(random(2, 3, 4), random(3, 4, 5))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_gradients(masked: bool) -> None:
    mask = random(6, 6) if masked else None
    halves = [random(2, 3, 6, 32).requires_grad_() for _ in range(3)]
    wide = [x.detach().double().requires_grad_() for x in halves]
    results = []
    for inputs in (halves, wide):
        bias = None if mask is None else mask.to(inputs[0].dtype)
        y = scaled_dot_product_attention(*inputs, attn_mask=bias, is_causal=not masked)
        y.backward(torch.ones_like(y))
        results.append([y.detach(), *[x.grad for x in inputs]])
    for found, exact in zip(*results, strict=True):
        assert found.dtype == HALF
        # The output's rounding also enters the gradients, where large terms cancel.
        assert_close(found.double(), exact, rtol=2 * ULP, atol=0.02)


def test_gradients_of_a_linear_under_autocast() -> None:
    layer = torch.nn.Linear(64, 48)
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autocast("cpu", HALF):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == HALF
    half = layer.weight.detach().to(HALF).double()
    assert_close(x.grad.double(), half.sum(0).expand(5, -1), rtol=ULP, atol=1e-6)
    expected = x.detach().to(HALF).double().sum(0).expand(48, -1)
    assert_close(layer.weight.grad.double(), expected, rtol=ULP, atol=1e-6)


def test_where_pytorch_has_fast_products_or_by_choice_nothing_is_replaced(monkeypatch) -> None:
    monkeypatch.setattr(bfloat16, "has_fast_products", lambda: True)
    assert bfloat16.use_fast_products.__wrapped__() is None
    assert bfloat16.product_name() == "PyTorch's"
    monkeypatch.setattr(bfloat16, "has_fast_products", lambda: False)
    assert bfloat16.product_name().startswith("by conversion")
    monkeypatch.setenv("XVERSE_KERNELS", "none")
    assert bfloat16.use_fast_products.__wrapped__() is None
    assert bfloat16.product_name() == "PyTorch's, slow here"


def test_replacing_prints_no_warning_and_is_undone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = bfloat16.register()
    again._destroy()
    a, b = random(3, 4), random(4, 3)
    assert_close((a @ b).double(), a.double() @ b.double(), rtol=ULP, atol=1e-6)
