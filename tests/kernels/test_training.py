"""The training kernels on the CPU compared with the plain layers, in bfloat16 and float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from xverse.kernels.native import library
from xverse.kernels.training import KernelPacked, loss_kernels, use_training_kernels
from xverse.model import Packed, XverseConfig, XverseForCausalLM, init_weights, linear_cross_entropy
from xverse.model.loss import IGNORE
from xverse.train.blocks import prepare_blocks
from xverse.train.settings import TrainConfig

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels were not compiled")


@pytest.fixture(scope="module", params=[32, 64], ids=lambda size: f"heads of {size}")
def model(request: pytest.FixtureRequest) -> XverseForCausalLM:
    """Heads of 64 have a fused kernel on processors with AVX-512 BF16."""
    config = XverseConfig(
        vocab_size=1000, hidden_size=3 * request.param, intermediate_size=200, num_hidden_layers=2,
        num_attention_heads=3, max_position_embeddings=512,
    )  # fmt: skip
    model = XverseForCausalLM(config)
    init_weights(model, seed=0)
    return model


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and document ids [3, 301], of four documents, one and two, some targets ignored."""
    generator = torch.Generator().manual_seed(1)
    tokens, targets = (torch.randint(4, 1000, (3, 301), generator=generator) for _ in range(2))
    targets[0, :50] = IGNORE
    ids = torch.zeros_like(tokens, dtype=torch.int32)
    ids[0, 100:] += 1
    ids[0, 101:] += 1
    ids[0, 140:] += 1
    ids[2, 7:] += 1
    return tokens, targets, ids


def gradients(
    model: XverseForCausalLM, batch: tuple[Tensor, Tensor, Tensor], context: type[Packed], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The loss, and the gradients of all parameters by name."""
    tokens, targets, ids = batch
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model.loss(tokens, targets, context(ids), z_loss=1e-3)
    loss.backward()
    results = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **results}


def with_kernels(model: XverseForCausalLM) -> XverseForCausalLM:
    model = copy.deepcopy(model)
    use_training_kernels(model)
    return model


def test_a_step_is_as_exact_as_the_plain_one(
    kernels: str, model: XverseForCausalLM, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Both compute in bfloat16. Compared with float32, the kernels' gradients have no larger error than the
    plain layers': 5 % of tolerance in all, a half for single tensors, whose errors vary randomly."""
    exact = gradients(copy.deepcopy(model), batch, Packed, torch.float32)
    plain = gradients(copy.deepcopy(model), batch, Packed, torch.bfloat16)
    ours = gradients(with_kernels(model), batch, KernelPacked, torch.bfloat16)
    assert ours.keys() == exact.keys()
    errors, peers = (
        torch.stack([(x[name] - true).norm() / true.norm() for name, true in exact.items()])
        for x in (ours, plain)
    )
    assert (errors < 1.5 * peers + 1e-4).all()
    assert errors.norm() < 1.05 * peers.norm()


def test_float32_does_not_change(model: XverseForCausalLM, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    plain = gradients(copy.deepcopy(model), batch, Packed, torch.float32)
    ours = gradients(with_kernels(model), batch, KernelPacked, torch.float32)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_threads_do_not_change_the_bits() -> None:
    """Of the kernels alone, not of PyTorch's matmuls. The attention is the fused kernel on processors that
    have it."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(70, 5000, generator=generator).bfloat16()
    targets = torch.randint(0, 5000, (70,), generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        kernels = loss_kernels(logits)
    assert kernels is not None
    ids = (torch.arange(333).expand(2, 333) > torch.tensor([[100], [301]])).int()
    qkv = [torch.randn(2, 5, 333, 64, generator=generator).bfloat16().requires_grad_() for _ in range(3)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss, grad = kernels.softmax_gradient(logits.clone(), targets, 0.0)
            with torch.autocast("cpu", torch.bfloat16):
                mixed = KernelPacked(ids).attend(0, *qkv)
            results.append((loss, grad, mixed, *torch.autograd.grad(mixed.sum(), qkv)))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputed_layers_give_the_same_bits(
    kind: str, model: XverseForCausalLM, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    kept = gradients(with_kernels(model), batch, KernelPacked, torch.bfloat16)
    again = copy.deepcopy(model)
    prepare_blocks(
        again,
        TrainConfig(steps=1, batch_size=1, learning_rate=1.0, activation_checkpointing=kind),  # type: ignore[arg-type]
    )
    results = gradients(again, batch, KernelPacked, torch.bfloat16)
    assert all(torch.equal(results[name], kept[name]) for name in kept)


def attend(
    kind: type[Packed], dtype: torch.dtype, ids: Tensor, qkv: list[Tensor], weights: Tensor
) -> list[Tensor]:
    """Output, and the gradients of q, k and v [B, H, T, head_dim]."""
    leaves = [x.to(dtype).requires_grad_() for x in qkv]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        mixed = kind(ids).attend(0, *leaves)
    grads = torch.autograd.grad((mixed.float() * weights).sum(), leaves)
    return [x.detach().float() for x in (mixed, *grads)]


@pytest.mark.parametrize("deviation", [1, 4])
@pytest.mark.parametrize(("length", "documents"), [(1, 1), (33, 3), (130, 5), (257, 2), (600, 4)])
@pytest.mark.parametrize("size", [64, 128])
def test_attention(kernels: str, length: int, documents: int, deviation: int, size: int) -> None:
    """Relative error (root mean square) of output and gradients against float32: below 0.7 % and under twice
    that of PyTorch's own where scores have a standard deviation of 1. Larger scores are rounded more
    coarsely, as in any attention with scores in bfloat16; the fused kernel keeps them in float32."""
    generator = torch.Generator().manual_seed(length)
    cuts = torch.randint(0, length, (2, documents - 1), generator=generator).sort(dim=1).values
    ids = torch.searchsorted(cuts, torch.arange(length).expand(2, length).contiguous(), right=True)
    qkv = [(torch.randn(2, 3, length, size, generator=generator)).bfloat16() for _ in range(3)]
    qkv[0] *= deviation
    weights = torch.randn(2, 3, length, size, generator=generator)
    exact = attend(Packed, torch.float32, ids, qkv, weights)
    ours, plain = (attend(kind, torch.bfloat16, ids, qkv, weights) for kind in (KernelPacked, Packed))
    for true, one, other in zip(exact, ours, plain, strict=True):
        norm = true.norm().clamp(min=1e-2)  # with one token, q and k have no gradient
        error, peer = ((x - true).norm() / norm for x in (one, other))
        assert error < (0.007 if deviation == 1 or kernels in ("avx512_amx", "avx512_bf16") else 0.015)
        if deviation == 1:
            assert error < 2 * peer + 1e-3


@pytest.mark.parametrize("size", [64, 128])
def test_documents_that_begin_next_to_a_block_boundary(kernels: str, size: int) -> None:
    """The kernel's blocks have 64 keys; each document extends beyond the next block. One key too many or too
    few is an error of a tenth."""
    generator = torch.Generator().manual_seed(0)
    cuts = torch.tensor([1, 62, 63, 64, 65, 127, 128])
    ids = (torch.arange(257) >= cuts[:, None]).int()
    qkv = [torch.randn(len(cuts), 1, 257, size, generator=generator).bfloat16() for _ in range(3)]
    weights = torch.randn(len(cuts), 1, 257, size, generator=generator)
    exact = attend(Packed, torch.float32, ids, qkv, weights)
    for true, one in zip(exact, attend(KernelPacked, torch.bfloat16, ids, qkv, weights), strict=True):
        assert ((one - true).flatten(1).norm(dim=1) < 0.007 * true.flatten(1).norm(dim=1)).all()


def test_loss_in_chunks(kernels: str) -> None:
    """Several chunks, ignored targets, a vocabulary size without small factors."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 32, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(1013, 32, generator=generator).requires_grad_()
    targets = torch.randint(0, 1013, (200,), generator=generator)
    targets[3:9] = IGNORE
    with torch.autocast("cpu", torch.bfloat16):
        chunked = loss_kernels(hidden)
    assert chunked is not None
    results = []
    for option in (chunked, None):
        loss = linear_cross_entropy(hidden, weight, targets, z_loss=1e-2, chunk=64, kernels=option)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    for one, other in zip(*results, strict=True):
        assert (one - other).float().norm() < 5e-3 * other.float().norm()
