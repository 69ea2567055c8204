"""Rounding compared with plain scaling and with the compiled search; GPTQ by the error that it minimises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.scale import examples
from xverse.config import UserError
from xverse.kernels.native import library
from xverse.kernels.weight import TABLES, QuantizedWeight
from xverse.quant import gptq as gptq_module
from xverse.quant import methods
from xverse.quant.gptq import Hessian, HessianFactor, gptq, round_columns
from xverse.quant.methods import Levels, round_to, rtn, rtn_row

TABLE = torch.tensor(TABLES[4], dtype=torch.int8)


def _weight(rows: int, inputs: int, seed: int = 0, tail: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inputs, generator=generator) * 0.02
    return weight + tail * weight * weight.abs() * 50


def _error(quantized: QuantizedWeight, weight: Tensor) -> float:
    return (quantized.dequantize() - weight).square().mean().item()


@pytest.mark.parametrize("bits", [4, 8])
def test_rtn_row_is_upstreams_scheme(bits: int) -> None:
    weight = _weight(16, 256)
    quantized = rtn_row(weight, bits)
    largest = 2 ** (bits - 1) - 1
    scales = (weight.abs().amax(1, keepdim=True) / largest).bfloat16()
    assert torch.equal(quantized.scales, scales)
    assert torch.equal(quantized.q.float(), (weight / scales.float()).round().clamp(-largest - 1, largest))


@settings(max_examples=examples(30), deadline=None)
@given(
    seed=st.integers(0, 1000),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64, 128]),
    tail=st.sampled_from([0.0, 1.0, 5.0]),
)
def test_searched_scales_are_never_worse_than_the_largest_magnitude(
    seed: int, bits: int, group: int, tail: float
) -> None:
    weight = _weight(5, 256, seed, tail)
    largest = weight.view(5, -1, group).abs().amax(2)
    plain = (largest / (2 ** (bits - 1) - 1)).bfloat16()
    plain_error = (QuantizedWeight(round_to(weight, plain, bits), plain, bits).dequantize() - weight).square()
    error = (rtn(weight, bits, group).dequantize() - weight).square()
    grouped = (x.view(5, -1, group).sum(2) for x in (error, plain_error))
    searched, unsearched = grouped
    assert (searched <= unsearched * (1 + 1e-5)).all()


@pytest.mark.parametrize(("bits", "table"), [(4, None), (8, None), (4, TABLE)])
@pytest.mark.parametrize("weighted", [False, True])
def test_compiled_search_gives_the_bits_of_pytorchs(
    bits: int, table: Tensor | None, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library() is None:
        pytest.skip("the kernels were not compiled")
    weight = _weight(37, 384, tail=2.0)
    weight[3, 128:256] = 0.0
    weight[4, :128] *= 1e-32
    weight[5, 7] = torch.nan
    weight[6, 200] = torch.inf
    importance = torch.rand(384, generator=torch.Generator().manual_seed(1)) + 0.01 if weighted else None
    compiled = rtn(weight, bits, 128, importance, table)
    monkeypatch.setattr(methods, "library", lambda: None)
    plain = rtn(weight, bits, 128, importance, table)
    assert torch.equal(compiled.q, plain.q)
    assert torch.equal(compiled.scales.view(torch.int16), plain.scales.view(torch.int16))
    assert compiled.scales[5, 0].isnan()
    assert compiled.scales[6, 1].isnan()
    assert compiled.dequantize()[3, 128:256].count_nonzero() == 0
    assert compiled.q[4, :128].count_nonzero() == 0


def test_threads_do_not_change_the_result() -> None:
    weight = _weight(64, 256)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = rtn(weight, 4, 128)
        torch.set_num_threads(2)
        two = rtn(weight, 4, 128)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.q, two.q)
    assert torch.equal(one.scales, two.scales)


def test_importance_moves_the_error_to_unimportant_inputs() -> None:
    weight = _weight(32, 128)
    importance = torch.ones(128)
    importance[:4] = 1000.0
    weighted, plain = rtn(weight, 4, 128, importance), rtn(weight, 4, 128)
    assert _error(plain, weight) < _error(weighted, weight)
    difference = [(x.dequantize() - weight).square() * importance for x in (weighted, plain)]
    assert difference[0].sum() < 0.8 * difference[1].sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_rounded_from_their_values(dtype: torch.dtype) -> None:
    weight = _weight(8, 128).to(dtype)
    assert torch.equal(rtn(weight, 4, 64).q, rtn(weight.float(), 4, 64).q)


def test_group_that_does_not_divide_is_named() -> None:
    with pytest.raises(UserError, match="group_size: 128 does not divide the 192 inputs"):
        rtn(_weight(2, 192), 4, 128)
    with pytest.raises(UserError, match="bits: 5"):
        rtn(_weight(2, 128), 5, 128)
    with pytest.raises(UserError, match="bits: 6"):
        rtn_row(_weight(2, 128), 6)


def _correlated(tokens: int, inputs: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs // 4, inputs, generator=generator)
    x = torch.randn(tokens, inputs // 4, generator=generator) @ mixing
    return x + 0.1 * torch.randn(tokens, inputs, generator=generator)


def _hessian(x: Tensor) -> Tensor:
    hessian = Hessian(x.shape[-1])
    hessian.add(x[: len(x) // 2])
    hessian.add(x[len(x) // 2 :])
    return hessian.mean


@pytest.mark.parametrize("group", [32, 128])
def test_gptq_changes_the_outputs_far_less_than_rounding_to_nearest(group: int) -> None:
    weight, x = _weight(48, 256), _correlated(2000, 256)
    hessian = _hessian(x)
    torch.testing.assert_close(hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-3)
    learnt = gptq(weight, 4, group, HessianFactor(hessian))
    nearest = rtn(weight, 4, group, hessian.diagonal())
    differences = [rounded.dequantize() - weight for rounded in (learnt, nearest)]
    errors = [((difference @ hessian) * difference).sum() for difference in differences]
    assert errors[0] < 0.5 * errors[1]
    held_out = _correlated(2000, 256)[:500]
    outputs = [(held_out @ difference.T).square().mean() for difference in differences]
    assert outputs[0] < 0.6 * outputs[1]
    assert torch.equal(learnt.q, gptq(weight, 4, group, HessianFactor(hessian)).q)


def test_gptq_without_correlation_rounds_to_nearest() -> None:
    weight = _weight(8, 64)
    learnt, nearest = gptq(weight, 4, 32, HessianFactor(torch.eye(64))), rtn(weight, 4, 32)
    assert torch.equal(learnt.q, nearest.q)
    assert torch.equal(learnt.scales, nearest.scales)


def test_gptq_accepts_inputs_that_are_always_zero_and_a_singular_hessian() -> None:
    weight, x = _weight(8, 64), _correlated(20, 64)
    x[:, 10:20] = 0.0
    learnt = gptq(weight, 4, 32, HessianFactor(_hessian(x)))
    assert learnt.scales.isfinite().all()
    assert _error(learnt, weight) < 0.05 * weight.square().mean().item()
    nothing = gptq(weight, 4, 32, HessianFactor(torch.zeros(64, 64)))
    assert torch.equal(nothing.q, rtn(weight, 4, 32).q)


@pytest.mark.parametrize("table", [None, TABLE])
def test_rows_compensate_errors_of_rows_before_them(table: Tensor | None) -> None:
    weight, hessian = _weight(48, 256), _hessian(_correlated(2000, 256))
    factor = HessianFactor(hessian)
    outer = _correlated(1000, 48, 7)
    gradients = outer.T @ outer / len(outer)

    def error(result: QuantizedWeight) -> float:
        difference = result.dequantize() - weight
        return ((gradients @ difference @ hessian) * difference).sum().item()

    plain, rows = (gptq(weight, 4, 64, factor, table, given) for given in (None, gradients))
    assert torch.equal(plain.scales, rows.scales)
    assert error(rows) < 0.75 * error(plain)
    unrelated = gptq(weight, 4, 64, factor, table, torch.rand(48).diag())
    assert (unrelated.q == plain.q).float().mean() > 0.98


def _published_gptq(weight: Tensor, hessian: Tensor, scales: Tensor, order: Tensor) -> Tensor:
    """GPTQ as published: the error of a column moves by the Cholesky factor of the inverse Hessian."""
    damped = hessian[order][:, order].double()
    damped.diagonal().add_(0.01 * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    columns, spread = weight[:, order].double(), scales[:, order // 32].double()
    q = torch.empty_like(columns)
    for k in range(columns.shape[1]):
        q[:, k] = (columns[:, k] / spread[:, k]).round().clamp(-8, 7)
        error = (columns[:, k] - q[:, k] * spread[:, k]) / upper[k, k]
        columns[:, k:] -= error[:, None] * upper[k, k:]
    return torch.empty_like(q).index_copy_(1, order, q)


def test_feedback_equals_gptq_as_published() -> None:
    weight, x = _weight(48, 192), torch.randn(600, 192, generator=torch.Generator().manual_seed(3))
    hessian = _hessian(x @ torch.randn(192, 192, generator=torch.Generator().manual_seed(4)))
    factor = HessianFactor(hessian)
    learnt = gptq(weight, 4, 32, factor)
    published = _published_gptq(weight, hessian, learnt.scales, factor.order)
    # A tie that another precision breaks the other way changes the rest of its row.
    assert (learnt.q == published).float().mean() > 0.98
    assert (learnt.q == published).all(dim=1).float().mean() > 0.8


def test_every_table_has_its_bits_and_fits_the_kernels() -> None:
    for bits, entries in TABLES.items():
        assert len(entries) == 1 << bits
        assert list(entries) == sorted(set(entries))
        assert entries[-1] - entries[0] <= 127


@given(
    entries=st.lists(st.integers(-127, 127), min_size=16, max_size=16, unique=True), seed=st.integers(0, 99)
)
@settings(max_examples=examples(20), deadline=None)
def test_levels_are_the_nearest_entries(entries: list[int], seed: int) -> None:
    table = torch.tensor(sorted(entries), dtype=torch.int8)
    x = torch.rand(200, generator=torch.Generator().manual_seed(seed)) * 300 - 150
    levels = Levels(4, table)
    distances = (x[:, None] - table.float()).abs()
    assert torch.equal((x - levels.value(x)).abs(), distances.amin(dim=1))
    assert torch.equal(table[levels.index(x).int() + 8].float(), levels.value(x))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_table_leaves_less_error_than_integers(group: int) -> None:
    weight = _weight(64, 768)
    hessian = _hessian(torch.randn(500, 768, generator=torch.Generator().manual_seed(8)))
    factor = HessianFactor(hessian)

    def error(result: QuantizedWeight) -> float:
        difference = weight - result.dequantize()
        return ((difference @ hessian) * difference).sum().item()

    assert error(rtn(weight, 4, group, table=TABLE)) < 0.87 * error(rtn(weight, 4, group))
    assert error(gptq(weight, 4, group, factor, TABLE)) < 0.95 * error(gptq(weight, 4, group, factor))


@pytest.mark.parametrize("table", [None, TABLE])
def test_compiled_feedback_gives_the_integers_of_pytorchs(
    table: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library() is None:
        pytest.skip("no compiled kernels")
    weight = _weight(33, 160)
    scales = rtn(weight, 4, 32, table=table).scales.float()
    feedback = torch.randn(160, 160, generator=torch.Generator().manual_seed(5)).triu() * 0.05
    arguments = (weight, scales, torch.arange(160) // 32, feedback, Levels(4, table))
    compiled = round_columns(*arguments)
    monkeypatch.setattr(gptq_module, "library", lambda: None)
    plain = round_columns(*arguments)
    assert (compiled == plain).float().mean() > 0.999


def test_hessian_is_the_mean_of_outer_products() -> None:
    x = torch.randn(3, 40, 70, generator=torch.Generator().manual_seed(6))
    hessian = Hessian(70)
    for part in x.split(1):
        hessian.add(part)
    flat = x.flatten(0, 1)
    torch.testing.assert_close(hessian.mean, flat.T @ flat / len(flat))
    assert torch.equal(hessian.mean, hessian.mean.T)
