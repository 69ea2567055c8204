"""Context parallelism: the tokens of a row are sharded over several processes, attention spans all of them.

A row is cut into 2 · n chunks; process r holds chunks r and 2n - 1 - r, which balances the work under a
causal mask. Keys and values travel round a ring (Liu et al., 2023, arXiv:2310.01889) while the present ones
are used; partial softmaxes are merged by their log-sum-exps. It uses point-to-point messages and torch's
fused kernels, so CPUs with gloo and GPUs with NCCL run the same code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xverse.model import document_starts

aten = torch.ops.aten


@dataclass(frozen=True)
class Ring:
    """The processes that share rows, in ring order, and this process's rank among them."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def columns(self, x: Tensor) -> Tensor:
        """This process's tokens [B, T/n] of whole rows [B, T]; T is a multiple of 2 · n."""
        assert x.shape[1] % (2 * self.size) == 0
        chunks = x.chunk(2 * self.size, dim=1)
        return torch.cat((chunks[self.rank], chunks[2 * self.size - 1 - self.rank]), dim=1)

    def pass_on(self, x: Tensor) -> Passing:
        """Start sending ``x`` to the next process and receiving a tensor of its shape from the previous
        one."""
        received = torch.empty_like(x)
        after = dist.get_global_rank(self.group, (self.rank + 1) % self.size)
        before = dist.get_global_rank(self.group, (self.rank - 1) % self.size)
        send = dist.P2POp(dist.isend, x, after, self.group)
        receive = dist.P2POp(dist.irecv, received, before, self.group)
        return Passing(x, received, dist.batch_isend_irecv([send, receive]))


@dataclass(frozen=True)
class Passing:
    """A send and a receive in progress."""

    sent: Tensor  # must not be freed before it has been sent
    received: Tensor
    works: list[Any]

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received


@dataclass(frozen=True)
class Piece:
    """A block of the score matrix: fully visible or, if ``causal``, up to its diagonal."""

    rows: slice
    queries: slice
    keys: slice
    causal: bool

    @property
    def q(self) -> tuple[slice, slice, slice]:
        return self.rows, slice(None), self.queries

    @property
    def k(self) -> tuple[slice, slice, slice]:
        return self.rows, slice(None), self.keys


class RingPacked:
    """``Packed`` for this process's tokens of rows that a ring shares; takes whole ``document_ids`` [B,
    T]."""

    def __init__(self, document_ids: Tensor, ring: Ring, device: torch.device | None = None) -> None:
        first, positions = document_starts(document_ids)  # [B, T] each
        device = device or document_ids.device
        self._ring = ring
        self.positions = ring.columns(positions).to(device)  # [B, T/n]
        self.rope_lengths = (positions.amax(dim=-1, keepdim=True) + 1).to(device)  # [B, 1]: of the whole row
        number = first.cumsum(dim=1).cpu()  # [B, T]
        self._pieces = [list(_pieces(number, ring, source)) for source in range(ring.size)]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotated q [B, H, T/n, head_dim] and k, plain v [B, KV, T/n, head_dim] → attention over the whole
        rows, in q's shape."""
        out: Tensor = _RingAttention.apply(q, k, v, self._pieces, self._ring)
        return out


def _pieces(number: Tensor, ring: Ring, source: int) -> Iterator[Piece]:
    """The blocks of scores between this process's queries and the keys of process ``source``; ``number`` int
    [B, T] counts the documents of each row. Rows with equal blocks are batched."""
    size = number.shape[1] // (2 * ring.size)
    chunks = number.unflatten(1, (2 * ring.size, size))  # [B, 2n, C]
    everyone = slice(0, len(number))
    for q_place, q_chunk in enumerate((ring.rank, 2 * ring.size - 1 - ring.rank)):
        for k_place, k_chunk in enumerate((source, 2 * ring.size - 1 - source)):
            q_start, k_start = q_place * size, k_place * size
            if q_chunk == k_chunk:
                one = chunks[:, q_chunk]  # [B, C]
                alike = bool((one == one[:1]).all())
                for row in range(1 if alike else len(one)):
                    start = q_start
                    for length in one[row].unique_consecutive(return_counts=True)[1].tolist():
                        part = slice(start, start + length)
                        yield Piece(everyone if alike else slice(row, row + 1), part, part, True)
                        start += length
            elif k_chunk < q_chunk:  # documents are contiguous: only one can span both chunks
                document = chunks[:, q_chunk, :1]  # [B, 1]
                q_counts = (chunks[:, q_chunk] == document).sum(dim=1).tolist()
                k_counts = (chunks[:, k_chunk] == document).sum(dim=1).tolist()
                pairs = list(zip(q_counts, k_counts, strict=True))
                alike = len(set(pairs)) == 1
                for row, (q_count, k_count) in enumerate(pairs[:1] if alike else pairs):
                    if k_count:
                        yield Piece(
                            everyone if alike else slice(row, row + 1),
                            slice(q_start, q_start + q_count),
                            slice(k_start + size - k_count, k_start + size),
                            False,
                        )


class _RingAttention(torch.autograd.Function):
    """Attention of q [B, H, T/n, head_dim] over the keys and values [B, KV, T/n, head_dim] of the whole ring.
    In the backward pass keys and values travel round once more, and their gradients with them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pieces: list[list[Piece]], ring: Ring) -> Tensor:
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        log_sum = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)  # [B, H, T/n]
        held = torch.stack((k, v))  # [2, B, H, T/n, head_dim]
        for step in range(ring.size):
            incoming = ring.pass_on(held) if step + 1 < ring.size else None
            for piece in pieces[(ring.rank - step) % ring.size]:
                part, part_sum = attention(q[piece.q], held[0][piece.k], held[1][piece.k], piece.causal)
                before = log_sum[piece.q]
                after = torch.logaddexp(before, part_sum)
                share, others = (part_sum - after).exp()[..., None], (before - after).exp()[..., None]
                out[piece.q] = out[piece.q] * others + part * share
                log_sum[piece.q] = after
            if incoming is not None:
                held = incoming.wait()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.pieces, ctx.ring = pieces, ring
        return out

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum = ctx.saved_tensors
        ring: Ring = ctx.ring
        out_grad = output_grads[0].contiguous()
        q_grad = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        held = torch.stack((k, v))
        travelling: Passing | None = None
        for step in range(ring.size):
            incoming = ring.pass_on(held) if step + 1 < ring.size else None
            held_grad = torch.zeros(held.shape, dtype=torch.float32, device=q.device)
            for piece in ctx.pieces[(ring.rank - step) % ring.size]:
                grads = attention_backward(
                    out_grad[piece.q],
                    q[piece.q],
                    held[0][piece.k],
                    held[1][piece.k],
                    out[piece.q],
                    log_sum[piece.q],
                    piece.causal,
                )
                q_grad[piece.q] += grads[0]
                held_grad[0][piece.k] += grads[1]
                held_grad[1][piece.k] += grads[2]
            if travelling is not None:
                held_grad += travelling.wait()
            travelling = ring.pass_on(held_grad)
            if incoming is not None:
                held = incoming.wait()
        assert travelling is not None
        k_grad, v_grad = travelling.wait()  # back at their owner
        return q_grad.to(q.dtype), k_grad.to(k.dtype), v_grad.to(v.dtype), None, None


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Output [B, H, Tq, head_dim] and log-sum-exps, float32 [B, H, Tq], by torch's kernels, of keys and
    values [B, KV, Tk, head_dim]."""
    k, v = _for_each_head(q, k), _for_each_head(q, v)
    if q.device.type == "cpu":
        out, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    elif q.dtype == torch.float32:  # the GPU flash kernels take 16-bit types only
        out, log_sum, _, _ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)
        log_sum = log_sum[:, :, : q.shape[2]]
    else:
        out, log_sum, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    return out, log_sum


def _for_each_head(q: Tensor, x: Tensor) -> Tensor:
    """Keys or values [B, KV, …] repeated for the query heads [B, H, …] that share them."""
    return x if q.shape[1] == x.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def attention_backward(
    out_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [B, H, Tq, head_dim], k and v [B, KV, Tk, head_dim] for one piece. ``out`` and
    ``log_sum`` are those of all pieces together, so the probabilities that the kernels recompute are shares
    of the whole softmax."""
    heads = k.shape[1]
    grads = _head_gradients(out_grad, q, _for_each_head(q, k), _for_each_head(q, v), out, log_sum, causal)
    if heads == q.shape[1]:
        return grads
    k_grad, v_grad = (grad.unflatten(1, (heads, -1)).sum(dim=2) for grad in grads[1:])
    return grads[0], k_grad, v_grad


def _head_gradients(
    out_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of keys and values for each query head, [B, H, Tk, head_dim]."""
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            out_grad, q, k, v, out, log_sum, 0.0, causal
        )
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout, which is 0
    if q.dtype == torch.float32:
        short = -q.shape[2] % 32  # the kernel reads sums in blocks of 32
        padded = torch.nn.functional.pad(log_sum, (0, short), value=torch.inf)
        grads = aten._scaled_dot_product_efficient_attention_backward(
            out_grad, q, k, v, None, out, padded, seed, seed, 0.0, [True, True, True, False], causal
        )
        return grads[:3]
    return aten._scaled_dot_product_flash_attention_backward(
        out_grad, q, k, v, out, log_sum.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, seed,
        seed,
    )  # fmt: skip
