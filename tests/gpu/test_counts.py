"""CUDA code on fake tensors, without a GPU: launches, bytes and memory are bounded, and nothing reads a value
back from the device, which fake tensors refuse."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu.count import Chunk, Count, Queries, counted, model_on_gpu
from benchmarks.gpu.trace import Counter, pretended_gpu, size
from xverse.hf.attention import attention_context
from xverse.kernels import ops
from xverse.kernels.linear import QuantLinear
from xverse.kernels.paged_attention import page_size
from xverse.model import SHAPES, FullCausal
from xverse.model.chunks import head_bytes, logit_bytes, loss_chunk
from xverse.model.loss import (
    LossKernels,
    _accumulate,
    _LinearCrossEntropy,
    linear_cross_entropy,
    softmax_gradient,
)

LAYERS = SHAPES["7b"].num_hidden_layers


@pytest.fixture(autouse=True)
def fake_gpu() -> Iterator[None]:
    with pretended_gpu():
        yield


def decoding(bits: int, batch: int, length: int, int8: bool = False, page: int = 32) -> Count:
    model = model_on_gpu(bits)
    return counted(model, Queries(model.config, batch, length, int8, page), batch)


@pytest.mark.parametrize(
    ("bits", "int8", "page"), [(16, False, 256), (16, True, 32), (8, False, 256), (4, False, 32)]
)
def test_a_decode_step_reads_weights_and_cache_once(bits: int, int8: bool, page: int) -> None:
    for batch, length in ((1, 2048), (64, 1024)):
        count = decoding(bits, batch, length, int8, page)
        assert count.ratio <= 1.3, (batch, length, count)
        assert count.launches <= 26 * LAYERS, (batch, length, count)


def test_int8_moves_less_than_bfloat16() -> None:
    assert decoding(16, 64, 1024, int8=True).bytes < 0.75 * decoding(16, 64, 1024).bytes
    assert decoding(8, 1, 512).bytes < 0.6 * decoding(16, 1, 512).bytes
    assert decoding(4, 1, 512).bytes < 0.4 * decoding(16, 1, 512).bytes


@pytest.mark.parametrize(("int8", "page"), [(False, 256), (True, 32)])
def test_a_prefill_chunk(int8: bool, page: int) -> None:
    model = model_on_gpu(16)
    count = counted(model, Chunk(model.config, 2048, 4096, int8=int8, page=page), 1)
    assert count.launches <= 40 * LAYERS
    assert count.bytes <= 75e9  # 2.9e13 FLOPs take an H100 longer than this


@pytest.mark.parametrize(("bits", "most"), [(4, 4.7e9), (8, 8.0e9), (16, 14.6e9)])
def test_memory_of_a_model_on_the_gpu(bits: int, most: float) -> None:
    model = model_on_gpu(bits)
    layer = sum(map(size, model.model.layers[0].state_dict().values()))
    total = sum(map(size, model.state_dict().values())) + (LAYERS - len(model.model.layers)) * layer
    assert total <= most
    with Counter() as counter:  # nothing is packed or copied on first use
        model.lm_head(torch.empty(1, 1, 4096, dtype=torch.bfloat16, device="cuda"))
    assert sum(launches for launches, _ in counter.by_name.values()) == 1


def test_head_and_loss_of_a_training_step() -> None:
    tokens, vocabulary, hidden = 8192, 100_534, 4096
    rows = torch.empty(tokens, hidden, dtype=torch.bfloat16, device="cuda")
    weight = torch.empty(vocabulary, hidden, device="cuda")
    targets = torch.empty(tokens, dtype=torch.int64, device="cuda")
    chunk = loss_chunk(vocabulary, "cuda")
    assert 2048 <= chunk <= 4096
    context: Any = SimpleNamespace(needs_input_grad=(True, True), set_materialize_grads=lambda on: None)
    with Counter() as counter:
        _LinearCrossEntropy.forward(
            context, rows, weight, targets, chunk, 0.0, LossKernels(softmax_gradient, _accumulate)
        )
    assert counter.flops == 3 * 2 * tokens * vocabulary * hidden
    assert counter.bytes <= 80e9
    assert counter.launches <= 120
    assert logit_bytes(tokens, vocabulary, "cuda") >= chunk * vocabulary * 8
    # The plan's count of the head: what is not a product, and the gradient's scaling in the backward pass.
    beside = counter.bytes - counter.by_name["mm"][1] + 8 * vocabulary * hidden
    if counter.by_name["_to_copy"][1] > 13 * vocabulary * hidden:
        beside -= (
            8 * tokens * vocabulary
        )  # CUDA's softmax converts bfloat16 itself; that of fake tensors does not
    assert head_bytes(tokens, vocabulary, hidden) == pytest.approx(beside, rel=0.1)


def test_products_of_a_training_step_are_those_of_the_plan() -> None:
    model = model_on_gpu(16)
    context = FullCausal(1, 512, "cuda")
    with Counter() as counter:
        model.model(torch.empty(1, 512, dtype=torch.int64, device="cuda"), context)
    head = 2 * 512 * model.config.vocab_size * model.config.hidden_size
    planned = model.config.flops_per_token(0)["full"] * 512  # without attention
    assert 3 * (counter.flops + head) == pytest.approx(planned, rel=0.1)


def test_ignored_targets_are_skipped_without_reading_their_number() -> None:
    rows = torch.empty(1000, 64, dtype=torch.bfloat16, device="cuda")
    weight = torch.empty(500, 64, dtype=torch.bfloat16, device="cuda")
    targets = torch.empty(1000, dtype=torch.int64, device="cuda")
    with Counter() as few:
        linear_cross_entropy(rows, weight, targets, reduction="sum", count=100)
    with Counter() as every:
        linear_cross_entropy(rows, weight, targets, reduction="sum")
    assert few.flops * 10 == every.flops


def test_packed_documents_are_one_call() -> None:
    q = torch.empty(1, 8192, 32, 128, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    ends = torch.empty(33, dtype=torch.int32, device="cuda")
    positions = torch.empty(1, 8192, dtype=torch.int64, device="cuda")
    x = torch.empty(1, 8192, 4096, dtype=torch.bfloat16, device="cuda")
    config = SimpleNamespace(_attn_implementation="sdpa")
    flattened = {"cu_seq_lens_q": ends, "max_length_q": 256}
    context = attention_context([], config, x, None, positions, None, flattened)
    with Counter() as counter:
        assert context.attend(0, q, q, q).shape == q.shape
    assert list(counter.by_name) == ["_varlen_attn"]


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_dequantises_in_one_launch(bits: int) -> None:
    layer = QuantLinear(4096, 11008, bits, 128).to_empty(device="cuda")
    x = torch.empty(1, 4096, 4096, dtype=torch.bfloat16, device="cuda")
    with Counter() as counter:
        y = ops.dequantized_linear(x, layer.tiles, 11008, bits)
        ops._DequantizedLinear.backward(
            SimpleNamespace(tiles=layer.tiles, outputs=11008, format=(bits, 0)),  # type: ignore[arg-type]
            y,
        )
    assert counter.by_name["dequantize"][0] == 2
    assert counter.launches <= 5


def test_blocks_of_256_only_in_large_caches() -> None:
    cuda, half = torch.device("cuda", 0), torch.bfloat16
    paged = page_size(cuda, half, 128, tokens=200_000, sequences=64)
    assert paged in (32, 256)  # PyTorch before 2.13 cannot read them
    assert page_size(cuda, half, 128, tokens=10_000, sequences=64) == 32
    assert page_size(cuda, torch.int8, 128, tokens=200_000, sequences=64) == 32
    assert page_size(torch.device("cpu"), half, 128, tokens=200_000, sequences=64) == 32


def test_cards_before_ampere() -> None:
    with pretended_gpu((7, 5)):
        assert page_size(torch.device("cuda", 0), torch.float16, 128, tokens=200_000, sequences=1) == 32
        assert decoding(4, 1, 512).ratio <= 1.3
