"""Training in bfloat16 on the CPU: the steps between the matrix products as kernels, forward and backward.

``use_training_kernels`` changes the classes of a model's layers; ``KernelPacked`` is the attention context.
Both fall back to the plain layers where the kernels do not apply: on other devices, with other dtypes, or if
they were not compiled. Results differ by rounding: the kernels round once where the plain layers round after
each of several steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from xverse.kernels.native import TYPES, call, library
from xverse.kernels.ops import OPERATIONS, is_eager_cpu, silu_mul
from xverse.model import Packed, linear_cross_entropy
from xverse.model.attention import AttentionContext, grouped
from xverse.model.loss import LossKernels
from xverse.model.transformer import MLP, Attention, DecoderLayer, RMSNorm, XverseForCausalLM, apply_all

_NORM_ROWS = 64  # rows in a partial sum of the weight's gradient in xv_train_norm_grad
_SCORE_BYTES = 16 * 2**20  # of one block of attention scores: fits in a last-level cache


def kernels_fit(x: Tensor) -> bool:
    """Whether the kernels apply: they were compiled, and ``x`` is a plain or fake tensor on the CPU under
    autocast to bfloat16."""
    return (
        (type(x) is Tensor or isinstance(x, FakeTensor))
        and x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and not torch.compiler.is_compiling()
        and library() is not None
    )


class _AddNorm(torch.autograd.Function):
    """x [..., D] float32 or bfloat16, delta [..., D] bfloat16 or None, weight [D] → x + delta in x's dtype
    and RMSNorm(x + delta) · weight in bfloat16, both [..., D].

    Backward: gradients of both results in their dtypes (the first may be None) → gradients of x in its dtype,
    of delta in bfloat16 and of the weight in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        x, scales = x.contiguous(), x.new_empty(x.shape[:-1], dtype=torch.float32)
        total = x if delta is None else torch.empty_like(x)
        y = torch.empty_like(x, dtype=torch.bfloat16)
        size = x.shape[-1]
        delta = None if delta is None else delta.contiguous()
        weight = weight.float()
        _call("xv_train_norm", x, delta, weight, total, y, scales, TYPES[x.dtype], scales.numel(), size, eps)
        ctx.save_for_backward(total, weight, scales)
        ctx.has_delta = delta is not None
        return total, y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dsum, dy = grads
        total, weight, scales = ctx.saved_tensors
        assert dy is not None
        dy, dsum = dy.contiguous(), None if dsum is None else dsum.contiguous()
        dx = torch.empty_like(total)
        ddelta = torch.empty_like(dy) if ctx.has_delta else None
        rows, size = scales.numel(), total.shape[-1]
        parts = weight.new_zeros(-(-rows // _NORM_ROWS), size)
        _call(
            "xv_train_norm_grad",
            dy, dsum, total, weight, scales, dx, ddelta, parts, TYPES[total.dtype], rows, size,
        )  # fmt: skip
        return dx, ddelta, parts.sum(0), None


class _Add(torch.autograd.Function):
    """x [..., D] float32 + delta [..., D] bfloat16 → [..., D] float32; gradients in the inputs' dtypes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor) -> Tensor:
        x, delta, y = x.contiguous(), delta.contiguous(), torch.empty_like(x)
        _call("xv_train_add", x, delta, y, y.numel())
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0].to(torch.bfloat16)


class _Linears(torch.autograd.Function):
    """x [..., K] bfloat16 times the transpose of each weight [N, K] → [..., N] bfloat16; gradients in the
    inputs' dtypes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        cast = [weight.to(torch.bfloat16) for weight in weights]
        ctx.save_for_backward(x, *cast)
        ctx.types = [weight.dtype for weight in weights]
        return tuple(x @ weight.T for weight in cast)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        flat = x.flatten(0, -2)  # [N, K]
        rows = [grad.flatten(0, -2) for grad in grads]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = rows[0] @ weights[0]
            for row, weight in zip(rows[1:], weights[1:], strict=True):
                dx.addmm_(row, weight)
            dx = dx.view_as(x)
        weights = zip(rows, ctx.types, ctx.needs_input_grad[1:], strict=True)
        return dx, *[(row.T @ flat).to(dtype) if needed else None for row, dtype, needed in weights]


class _SiluMul(torch.autograd.Function):
    """silu(gate) · up, all [..., d_ff] bfloat16; the gradient → those of gate and up, bfloat16."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu_mul(gate, up) if is_eager_cpu(gate) else torch.ops.xverse.silu_mul(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dy, dgate, dup = grads[0].contiguous(), torch.empty_like(gate), torch.empty_like(up)
        _call("xv_train_silu_mul_grad", dy, gate, up, dgate, dup, gate.numel())
        return dgate, dup


class _ToHeads(torch.autograd.Function):
    """x [B, T, H, head_dim] bfloat16 → [B, H, T, head_dim] bfloat16, with rotary embedding by ``cos`` and
    ``sin`` float32 [B, 1, T, head_dim] unless they are None; the gradient goes the same way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        ctx.tables = cos, sin
        return _rotate(x, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.tables
        return _rotate(grads[0], cos, sin, back=True), None, None


class _FromHeads(torch.autograd.Function):
    """x [B, H, T, head_dim] bfloat16 → [B, T, H, head_dim] bfloat16; the gradient goes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _rotate(x, None, None, back=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _rotate(grads[0], None, None, back=False)


def _rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None, back: bool) -> Tensor:
    """``_ToHeads``, or its inverse, of bfloat16."""
    x = x.contiguous()
    batch, length, heads, size = (x.transpose(1, 2) if back else x).shape
    y = x.new_empty((batch, length, heads, size) if back else (batch, heads, length, size))
    _call("xv_train_rotate", x, cos, sin, y, batch, length, heads, size, back)
    return y


class _Attention(torch.autograd.Function):
    """Causal attention within documents: q, k, v bfloat16 [B, H, T, head_dim] → bfloat16 [B, H, T, head_dim].
    ``starts`` int32 [B, T] is the first key that each query sees. The gradient → those of q, k, v, bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, log_sums = torch.ops.xverse.packed_attention(q, k, v, starts)
        ctx.save_for_backward(q, k, v, log_sums, starts, out if _is_fused(q) else None)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_sums, starts, out = ctx.saved_tensors
        if out is None:
            return *_attention_grads(grads[0], q, k, v, log_sums, starts), None
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        grad = grads[0].contiguous()
        _call("xv_train_attention_grad", grad, q, k, v, out, log_sums, starts, dq, dk, dv, *q.shape)
        return dq, dk, dv, None


def _is_fused(q: Tensor) -> bool:
    """Whether one kernel computes the whole attention of ``q`` [B, H, T, head_dim] on this processor."""
    kernels = library()
    return kernels is not None and bool(kernels.xv_has_train_attention(q.shape[-1]))


def _attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The output bfloat16 [B, H, T, head_dim] of ``_Attention``, and the log of each query's sum of
    exponentials float32 [B, H, T].

    Without the fused kernel: blocks of queries against the keys before them. As in FlashAttention (Dao et
    al., 2022, arXiv:2205.14135) the backward pass recomputes the scores from the log-sums, so that only one
    block of scores exists at a time.
    """
    batch, heads, length, size = q.shape
    out, log_sums = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    if _is_fused(q):
        _call("xv_train_attention", q, k, v, starts, out, log_sums, *q.shape)
        return out, log_sums
    q, k, v, mixed = (x.flatten(0, 1) for x in (q, k, v, out))  # [B*H, T, head_dim]
    for first, last, least in _blocks(q, starts):
        keys = slice(least, last)
        scores = torch.bmm(q[:, first:last], k[:, keys].transpose(1, 2))  # [B*H, block, keys]
        _call(
            "xv_train_softmax",
            scores, starts, log_sums, batch, heads, length, first, last - first, least, last - least,
            size**-0.5,
        )  # fmt: skip
        mixed[:, first:last] = torch.bmm(scores, v[:, keys])
    return out, log_sums


def _attention_grads(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, log_sums: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, bfloat16 [B, H, T, head_dim], without the fused kernel."""
    shape, size = q.shape, q.shape[-1]
    grad, q, k, v = (x.contiguous().flatten(0, 1) for x in (grad, q, k, v))  # [B*H, T, head_dim]
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(k, dtype=torch.float32) for _ in range(2))
    for first, last, least in _blocks(q, starts):
        keys = slice(least, last)
        queries, gradients = q[:, first:last], grad[:, first:last]
        scores = torch.bmm(queries, k[:, keys].transpose(1, 2))  # [B*H, block, keys]
        dp = torch.bmm(gradients, v[:, keys].transpose(1, 2))
        _call(
            "xv_train_softmax_grad",
            scores, dp, starts, log_sums, *shape[:3], first, last - first, least, last - least, size**-0.5,
        )  # fmt: skip
        dq[:, first:last] = torch.bmm(dp, k[:, keys])
        dk[:, keys] += torch.bmm(dp.transpose(1, 2), queries)
        dv[:, keys] += torch.bmm(scores.transpose(1, 2), gradients)
    dq, dk, dv = (x.to(q.dtype).view(shape) for x in (dq, dk, dv))
    return dq, dk, dv


# One operation for the dispatcher, so that selective recomputation keeps its result but not the scores, which
# the softmax overwrites.
OPERATIONS.define("packed_attention(Tensor q, Tensor k, Tensor v, Tensor starts) -> (Tensor, Tensor)")
OPERATIONS.impl("packed_attention", _attention, "CPU")
torch.library.register_fake(
    "xverse::packed_attention",
    lambda q, k, v, starts: (torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)),
    lib=OPERATIONS,
)


def _blocks(q: Tensor, starts: Tensor) -> Iterator[tuple[int, int, int]]:
    """Blocks of the queries of ``q`` [B*H, T, head_dim]: first query, last query + 1, and the first key that
    any of them sees."""
    rows, length = q.shape[:2]
    block = min(max(_SCORE_BYTES // (2 * rows * length) // 32 * 32, 32), 256)
    least = starts.amin(0)  # [T]
    for first in range(0, length, block):
        last = min(first + block, length)
        yield first, last, int(least[first:last].min())


class KernelPacked(Packed):
    """``Packed`` with attention by kernels where they apply."""

    def __init__(self, document_ids: Tensor, device: torch.device | None = None) -> None:
        super().__init__(document_ids, device)
        index = torch.arange(document_ids.shape[1], device=self.positions.device)
        self._starts = (index - self.positions).to(torch.int32)  # [B, T]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q`` [B, H, T, head_dim], ``k`` and ``v`` [B, KV, T, head_dim] → [B, H, T, head_dim]."""
        if q.dtype != torch.bfloat16 or not kernels_fit(q):
            return super().attend(layer, q, k, v)
        if grouped(q, k):  # the kernel takes a key head for each query head
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return _Attention.apply(q, k, v, self._starts)


class TrainingLinear(nn.Linear):
    """``nn.Linear``: [..., K] → [..., N]."""

    @classmethod
    def together(cls, layers: list[nn.Linear], x: Tensor) -> list[Tensor]:
        """``[layer(x) for layer in layers]`` of ``x`` [..., K]; the gradient of ``x`` is one tensor."""
        if not kernels_fit(x):
            return [nn.Linear.forward(layer, x) for layer in layers]
        return list(_Linears.apply(x.to(torch.bfloat16), *[layer.weight for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        return self.together([self], x)[0]


class TrainingMLP(MLP):
    """The activation [..., d_ff] in one pass."""

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        if gate.dtype != torch.bfloat16 or not kernels_fit(gate):
            return super().activate(gate, up)
        return _SiluMul.apply(gate, up)


class TrainingAttention(Attention):
    """Heads are split, rotated and transposed in one pass; [B, T, D] → [B, T, D]."""

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], context: AttentionContext) -> Tensor:
        if self.qk_norm or x.dtype != torch.bfloat16 or not kernels_fit(x):
            return super().forward(x, rope, context)
        batch, length = x.shape[:2]
        cos, sin = (table.float().expand(batch, 1, length, self.head_dim).contiguous() for table in rope)
        q, k, v = (
            heads.view(batch, length, -1, self.head_dim)
            for heads in apply_all((self.q_proj, self.k_proj, self.v_proj), x)
        )
        q, k, v = _ToHeads.apply(q, cos, sin), _ToHeads.apply(k, cos, sin), _ToHeads.apply(v, None, None)
        mixed = context.attend(self.layer, q, k, v)  # [B, H, T, head_dim]
        return self.o_proj(_FromHeads.apply(mixed).flatten(2))  # [B, T, D]


class TrainingRMSNorm(RMSNorm):
    """The norm [..., D] → [..., D] bfloat16, in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in TYPES or not kernels_fit(x):
            return super().forward(x)
        return _AddNorm.apply(x, None, self.weight, self.eps)[1]


class TrainingLayer(DecoderLayer):
    """Residual additions fused with the norms after them; the residual stream [B, T, D] stays float32."""

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], context: AttentionContext) -> Tensor:
        if x.dtype != torch.float32 or not kernels_fit(x):
            return super().forward(x, rope, context)
        before, after = self.input_layernorm, self.post_attention_layernorm
        x, normed = _AddNorm.apply(x, None, before.weight, before.eps)
        x, normed = _AddNorm.apply(x, self.self_attn(normed, rope, context), after.weight, after.eps)
        return _Add.apply(x, self.mlp(normed))  # [B, T, D]


class TrainingForCausalLM(XverseForCausalLM):
    """The loss by kernels."""

    def loss(self, tokens: Tensor, targets: Tensor, context: AttentionContext, z_loss: float = 0.0) -> Tensor:
        hidden = self.model(tokens, context).flatten(0, 1)  # [B*T, D]
        return linear_cross_entropy(
            hidden, self.lm_head.weight, targets.flatten(), reduction="sum", z_loss=z_loss,
            kernels=loss_kernels(hidden),
        )  # fmt: skip


_TRAINING: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: TrainingLinear,
    MLP: TrainingMLP,
    Attention: TrainingAttention,
    RMSNorm: TrainingRMSNorm,
    DecoderLayer: TrainingLayer,
}


def use_training_kernels(model: nn.Module) -> None:
    """Changes the classes of the layers of ``model``, xverse's or its transformers wrapper, to ones that
    compute in kernels; parameters and their names stay. The head does not change: the loss takes its weight.
    """
    for module in model.model.modules():  # type: ignore[union-attr]  # XverseModel
        kind = _TRAINING.get(type(module))
        if kind is not None and getattr(module, "bias", None) is None:
            module.__class__ = kind
    if type(model) is XverseForCausalLM:
        model.__class__ = TrainingForCausalLM


def loss_kernels(hidden: Tensor) -> LossKernels | None:
    """The kernels for ``linear_cross_entropy`` of ``hidden`` [N, D], or None where they do not apply."""
    return LossKernels(_softmax_gradient, _accumulate) if kernels_fit(hidden) else None


def _softmax_gradient(logits: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """``logits`` bfloat16 [N, V] and ``targets`` int64 [N] → the sum of losses float32 [], and the gradient
    of the logits in their place."""
    losses = torch.empty(len(logits), dtype=torch.float32)
    _call("xv_train_cross_entropy", logits, targets.contiguous(), losses, *logits.shape, z_loss)
    return losses.sum(), logits


def _accumulate(total: Tensor, value: Tensor) -> None:
    """``total`` float32 [...] += ``value`` bfloat16 [...], both contiguous."""
    _call("xv_train_accumulate", total, value, total.numel())


def _call(name: str, *arguments: Tensor | float | None) -> None:
    """Call a kernel; nothing to compute if one of the tensors is a fake one."""
    if not any(isinstance(argument, FakeTensor) for argument in arguments):
        call(name, *arguments)
