"""The compiled kernels compared with float64, over odd shapes, for every instruction set of this machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.scale import examples
from xverse.kernels import ops
from xverse.kernels.linear import QuantLinear
from xverse.kernels.tiles import from_rows, tile, to_rows
from xverse.kernels.weight import QuantizedWeight
from xverse.model.config import XverseConfig
from xverse.model.rope import rope_tables, rotate
from xverse.quant import methods

# Bits, and the last entry of a table or None: integers, narrow tables (-64 to 63) and wide ones.
FORMATS = [(4, None), (8, None), (4, 127), (3, 63), (2, 63), (3, None), (2, 127)]


def random_weight(
    outputs: int, inputs: int, bits: int, group: int, seed: int = 0, last: int | None = None
) -> QuantizedWeight:
    """Every integer of the range, the smallest included, and scales of very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    q = torch.randint(-half, half, (outputs, inputs), dtype=torch.int8, generator=generator)
    q[0] = -half
    scales = torch.rand(outputs, inputs // group, generator=generator) * 0.02 + 1e-4
    scales[:, 0] *= -100
    table = None
    if last is not None:
        entries = torch.randperm(2 * last, generator=generator)[: 2 * half] - last
        entries[:2] = torch.tensor([last, -last - 1])
        table = entries.sort().values.to(torch.int8)
    return QuantizedWeight(q, scales.bfloat16(), bits, table)


def reference(x: Tensor, weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """The product in float64 with activations quantised as in the kernels, and the sum of magnitudes by which
    rounding errors are measured, both [M, N]."""
    group = weight.group_size
    grouped = x.double().unflatten(1, (-1, group))  # [M, G, group]
    largest = grouped.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, 0.0)
    rounded = (grouped.float() * inverse.float()).round().double() * (largest / 127)
    exact = rounded.flatten(1) @ weight.dequantize(torch.float64).T
    size = rounded.flatten(1).abs() @ weight.dequantize(torch.float64).abs().T
    return exact, size


# A value halfway between two integers may round to either: at most one step in a few places.
TIES = 2e-4
BF16 = 2.0**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "last"), FORMATS)
@pytest.mark.parametrize(
    ("outputs", "inputs", "group"), [(1, 32, 32), (33, 192, 64), (70, 384, 128), (32, 1408, 128)]
)
def test_quantised_linear(
    kernels: str, bits: int, last: int | None, outputs: int, inputs: int, group: int, dtype: torch.dtype
) -> None:
    weight = random_weight(outputs, inputs, bits, group, last=last)
    layer = QuantLinear.from_weight(weight)
    for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 25, 40):
        x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        exact, size = reference(x, weight)
        result = layer(x)
        assert result.dtype == dtype
        tolerance = TIES + (BF16 if dtype == torch.bfloat16 else 0)
        assert ((result.double() - exact).abs() <= tolerance * size).all(), (kernels, tokens)


def test_activations_are_quantised_group_by_group(kernels: str) -> None:
    weight = random_weight(40, 256, 4, 128)
    x = torch.randn(3, 256)
    x[:, 5] = 1e4  # coarsens its own group of 128 only
    x[1] = 0
    x[2, 128:] = 0
    exact, size = reference(x, weight)
    result = ops.quant_linear(x, tile(weight), 40, 4)
    assert ((result.double() - exact).abs() <= TIES * size).all()
    assert (result[1] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_token_does_not_affect_others(kernels: str, value: float) -> None:
    weight = random_weight(40, 256, 4, 128)
    x = torch.randn(13, 256)
    clean = ops.quant_linear(x, tile(weight), 40, 4)
    x[4, 7] = value
    result = ops.quant_linear(x, tile(weight), 40, 4)
    assert result[4].isnan().all()
    others = torch.arange(13) != 4
    assert torch.equal(result[others], clean[others])


def test_tiny_and_huge_activations(kernels: str) -> None:
    weight = random_weight(32, 128, 8, 128)
    for size in (1e-40, 1e-30, 1e30):
        x = torch.full((1, 128), size)
        exact, magnitude = reference(x, weight)
        result = ops.quant_linear(x, tile(weight), 32, 8)
        assert result.isfinite().all()
        if size > 1e-37:  # smaller values count as zero
            assert ((result.double() - exact).abs() <= TIES * magnitude).all()


def test_several_weights_at_once_equal_one_by_one(kernels: str) -> None:
    for bits, last in FORMATS:
        layers = [QuantLinear.from_weight(random_weight(n, 256, bits, 128, n, last)) for n in (33, 1, 200)]
        for tokens in (1, 30):
            x = torch.randn(2, tokens, 256, dtype=torch.bfloat16)
            for layer, result in zip(layers, QuantLinear.together(layers, x), strict=True):
                assert result.shape == (2, tokens, layer.out_features)
                assert torch.equal(result, layer(x))
    mixed = [layers[0], QuantLinear.from_weight(random_weight(8, 256, 4, 64))]
    assert [y.shape[-1] for y in QuantLinear.together(mixed, x)] == [33, 8]


@pytest.mark.parametrize(("bits", "last"), FORMATS)
def test_gradients_reach_the_input(bits: int, last: int | None) -> None:
    layer = QuantLinear.from_weight(random_weight(40, 256, bits, 128, last=last))
    x = torch.randn(3, 256, requires_grad=True)
    layer(x).sum().backward()
    expected = layer.to_weight().dequantize().sum(0).expand(3, -1)
    torch.testing.assert_close(x.grad, expected)
    (QuantLinear.together([layer, layer], x)[1] * 2).sum().backward()
    torch.testing.assert_close(x.grad, 3 * expected)


def test_no_tokens() -> None:
    layer = QuantLinear.from_weight(random_weight(8, 128, 4, 128))
    assert layer(torch.empty(0, 128)).shape == (0, 8)


@given(
    form=st.sampled_from(FORMATS),
    group=st.sampled_from([32, 64, 128]),
    groups=st.integers(1, 5),
    outputs=st.integers(1, 100),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=examples(40), deadline=None)
def test_tiles_keep_every_value(
    form: tuple[int, int | None], group: int, groups: int, outputs: int, seed: int
) -> None:
    bits, last = form
    weight = random_weight(outputs, group * groups, bits, group, seed, last)
    tiles = tile(weight)
    back = QuantLinear.from_weight(weight).to_weight()
    rows = to_rows(weight)
    for found in (back, from_rows(rows, weight.scales, bits, weight.table)):
        assert torch.equal(found.q, weight.q)
        assert torch.equal(found.scales, weight.scales)
        assert found.table is weight.table is None or torch.equal(found.table, weight.table)
    assert rows.shape == (outputs, group * groups * bits // 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xverse.kernels.tiles.library", lambda: None)
        plain = tile(weight)
    stays = torch.ones_like(tiles, dtype=torch.bool)
    stays[-1] = outputs % 32 == 0  # outputs that pad the last tile have scales of 0 and any value
    assert torch.equal(plain[stays], tiles[stays])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "last"), FORMATS)
@pytest.mark.parametrize(
    ("outputs", "inputs", "group"), [(1, 32, 32), (100, 384, 64), (2049, 256, 128), (4100, 128, 128)]
)
def test_dequantised_parts_are_the_weight(
    bits: int, last: int | None, outputs: int, inputs: int, group: int, dtype: torch.dtype
) -> None:
    weight = random_weight(outputs, inputs, bits, group, last=last)
    layer = QuantLinear.from_weight(weight)
    parts = ops.dequantized_parts(layer.tiles, outputs, bits, dtype, layer.table_group)
    assert torch.equal(torch.cat([part.clone() for part in parts]), weight.dequantize(dtype))
    plain = ops.dequantize(layer.tiles, outputs, bits, dtype, layer.table_group)
    assert torch.equal(plain, weight.dequantize(dtype))


def test_scale_per_row_comes_back() -> None:
    weight = random_weight(40, 384, 4, 384)
    layer = QuantLinear.from_weight(weight)
    back = layer.to_weight()
    assert back.group_size == 384
    assert torch.equal(back.scales, weight.scales)
    assert torch.equal(back.q, weight.q)


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 8), (25, 100), (64, 512), (7, 9000)])
def test_bf16_linear(kernels: str, outputs: int, inputs: int) -> None:
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16)
    for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 9):
        x = torch.randn(tokens, inputs, dtype=torch.bfloat16)
        result = ops.linear_bf16(x, weight)
        exact = x.double() @ weight.double().T
        size = x.double().abs() @ weight.double().abs().T
        assert ((result.double() - exact).abs() <= BF16 * exact.abs() + 1e-6 * size).all(), (kernels, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 31, 64, 100, 4096])
def test_norm_and_activation(kernels: str, dtype: torch.dtype, size: int) -> None:
    tolerance = 1e-6 if dtype == torch.float32 else BF16
    for rows in (1, 3, 40):
        x, up = torch.randn(2, rows, size).mul(20).to(dtype).unbind()
        weight = torch.rand(size).to(dtype)
        normed = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
        torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6).double(), normed, rtol=tolerance, atol=1e-30)
        active = x.double() * x.double().sigmoid() * up.double()
        torch.testing.assert_close(ops.silu_mul(x, up).double(), active, rtol=2 * tolerance, atol=1e-30)


def test_activation_of_extreme_values(kernels: str) -> None:
    x = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 1e30, float("inf"), float("nan")])
    result = ops.silu_mul(x, torch.ones(8))
    assert result[:3].abs().max() < 1e-6 * 1e30  # -1e30 / e^87 is small compared with 1e30
    assert result[3] == 0
    assert torch.equal(result[4:7], x[4:7])
    assert result[7].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation(kernels: str, dtype: torch.dtype) -> None:
    for batch, length, heads, head_dim in ((1, 1, 3, 2), (2, 5, 4, 64), (1, 300, 2, 128)):
        q, k = torch.randn(2, batch, length, heads, head_dim).to(dtype).unbind()
        positions = torch.arange(7, 7 + length).expand(batch, length)
        config = XverseConfig(
            vocab_size=9,
            hidden_size=heads * head_dim,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=heads,
        )
        cos, sin = (table.to(dtype) for table in rope_tables(positions, config))
        expected = [
            rotate(x.double().transpose(1, 2), cos.double(), sin.double()).transpose(1, 2) for x in (q, k)
        ]
        ops.rotate_(q, k, cos, sin)
        tolerance = 1e-6 if dtype == torch.float32 else BF16
        for result, exact in zip((q, k), expected, strict=True):
            torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_gives_the_bits_of_pytorch(kernels: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(33, 384, generator=generator) * 0.02
    importance = torch.rand(384, generator=generator) + 0.01
    compiled = methods.rtn(weight, bits, 64, importance)
    monkeypatch.setattr(methods, "library", lambda: None)
    plain = methods.rtn(weight, bits, 64, importance)
    assert torch.equal(compiled.q, plain.q)
    assert torch.equal(compiled.scales, plain.scales)


def test_operations_have_shapes_on_the_meta_device() -> None:
    tiles = torch.empty(3, 2, 64 + 4 * 4 * 128, dtype=torch.uint8, device="meta")
    x = torch.empty(5, 256, dtype=torch.bfloat16, device="meta")
    assert torch.ops.xverse.quant_linear(x, tiles, 70, 4).shape == (5, 70)
    assert [y.shape for y in torch.ops.xverse.quant_linears(x, [tiles, tiles], [70, 96], 4)] == [
        (5, 70),
        (5, 96),
    ]
    assert torch.ops.xverse.linear_bf16(x, torch.empty(9, 256, device="meta")).shape == (5, 9)
    assert torch.ops.xverse.rms_norm(x, torch.empty(256, device="meta"), 1e-6).shape == x.shape
    assert torch.ops.xverse.silu_mul(x, x).shape == x.shape


def test_operations_are_well_formed() -> None:
    layer = QuantLinear.from_weight(random_weight(40, 256, 4, 128))
    x = torch.randn(3, 256)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.xverse.quant_linear, (x, layer.tiles, 40, 4), test_utils=checks)
    torch.library.opcheck(torch.ops.xverse.silu_mul, (x, x), test_utils=checks)
    torch.library.opcheck(torch.ops.xverse.rms_norm, (x, x[0], 1e-6), test_utils=checks)


def run_with(kernels: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XVERSE_KERNELS": kernels}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


LINEAR = """
import torch
from xverse.kernels.linear import QuantLinear
from xverse.kernels.native import kernel_name
from xverse.kernels.weight import QuantizedWeight
torch.manual_seed(0)
q = torch.randint(-8, 8, (40, 256), dtype=torch.int8)
weight = QuantizedWeight(q, torch.rand(40, 2).bfloat16(), 4)
layer = QuantLinear.from_weight(weight)
x = torch.randn(9, 256)
exact = x @ weight.dequantize().T
assert (layer(x) - exact).abs().max() < 0.02 * exact.abs().max()
assert torch.equal(layer.to_weight().q, q)
print(kernel_name())
"""


def test_without_kernels_pytorch_computes() -> None:
    done = run_with("none", LINEAR)
    assert (done.returncode, done.stdout) == (0, "torch\n"), done.stderr


def test_selected_kernels_are_used_or_refused(kernels: str) -> None:
    done = run_with(kernels, LINEAR)
    assert (done.returncode, done.stdout) == (0, f"{kernels}\n"), done.stderr
    done = run_with("avx1024", LINEAR)
    assert done.returncode != 0
    assert "XVERSE_KERNELS: 'avx1024' is not one of" in done.stderr


def test_a_missing_library_is_reported_once(tmp_path) -> None:  # type: ignore[no-untyped-def]
    code = (
        "import pathlib, xverse.kernels.native as native\n"
        f"native.LIBRARY = pathlib.Path({str(tmp_path / 'gone.so')!r})\n" + LINEAR
    )
    done = run_with("", code)
    assert (done.returncode, done.stdout) == (0, "torch\n"), done.stderr
    assert done.stderr.count("without its compiled CPU kernels") == 1
