"""The language-model loss without the full logits: head and cross-entropy fused over chunks of tokens.

At V = 100,534 the logits of 8 × 8,192 tokens would take 26 GB in float32. Here one chunk's logits exist at a
time, and its gradients are computed while they are in cache; the backward pass only scales them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from xverse.model.chunks import loss_chunk

IGNORE = -100


class LossKernels(NamedTuple):
    """Replacements for PyTorch's operations, for bfloat16 logits.

    ``softmax_gradient(logits [C, V], targets int64 [C], z_loss)`` returns the sum of the losses, float32 [],
    and their gradient [C, V] in the memory of the logits; ``accumulate(total, value)`` adds a bfloat16
    ``value`` [V, D] to a float32 ``total`` in place.
    """

    softmax_gradient: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    accumulate: Callable[[Tensor, Tensor], None]


class VocabularyShard(Protocol):
    """This process holds the head's rows from ``first`` on; each process holds at most ``rows``. ``maximum``
    and ``total`` all-reduce float32 [C, …] over the processes."""

    first: int
    rows: int

    def maximum(self, x: Tensor) -> Tensor: ...

    def total(self, x: Tensor) -> Tensor: ...


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    chunk: int | None = None,
    z_loss: float = 0.0,
    kernels: LossKernels | None = None,
    vocabulary: VocabularyShard | None = None,
    count: int | None = None,
) -> Tensor:
    """Cross-entropy of ``hidden`` [N, D] @ ``weight`` [V, D] transposed against ``targets`` int64 [N].

    Targets of -100 are ignored; "mean" divides by the number of the others (and is 0 without any). The
    matmuls run in ``hidden``'s dtype, or autocast's where it is enabled; softmax and sums in float32. Returns
    a float32 scalar, or [N] for "none", which carries no gradient. ``chunk`` is in tokens (default:
    ``loss_chunk``). While gradients are recorded, ``z_loss`` times the squared log-sum-exp is added to each
    token's loss (Chowdhery et al., 2022, section 5). ``kernels`` are used for gradients in bfloat16.

    ``count`` is the number of targets that are not ignored, if the caller knows it. The head skips ignored
    tokens if they are many; on a device other than the CPU only with ``count``, since counting would wait for
    the device.

    Where ``weight`` is one ``vocabulary`` shard of the head, all processes of the shards call this with equal
    ``hidden`` and ``targets``. Each gets the whole loss, and a partial sum as the gradient of ``hidden``.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    if vocabulary is not None or hidden.dtype != torch.bfloat16:
        kernels = None
    size, device = vocabulary.rows if vocabulary else weight.shape[0], hidden.device.type
    plain = chunk or loss_chunk(size, device)
    if reduction == "none":
        with torch.no_grad():
            return _token_losses(hidden, weight, targets, plain, vocabulary)
    divisor = (targets != IGNORE).sum().clamp(min=1)
    if count is None and device == "cpu":
        count = int((targets != IGNORE).sum())
    if count is not None and count < 0.9 * len(targets):  # fine-tuning: the head can skip the prompt's tokens
        kept = torch.nonzero_static(targets != IGNORE, size=count).flatten()  # [count]
        hidden, targets = hidden[kept], targets[kept]
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        total = _token_losses(hidden, weight, targets, plain, vocabulary).sum()
    else:
        softmax = functools.partial(softmax_gradient, vocabulary=vocabulary)
        chunk = chunk or loss_chunk(size, device, kernels is not None)
        step = kernels or LossKernels(softmax, _accumulate)
        total = _LinearCrossEntropy.apply(hidden, weight, targets, chunk, z_loss, step)
    if reduction == "sum":
        return total
    return total / divisor


def _token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, vocabulary: VocabularyShard | None
) -> Tensor:
    """Losses float32 [N] of ``hidden`` [N, D], without gradients."""
    weight = weight.to(hidden.dtype)
    losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)  # [N]
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        logits = (hidden[part] @ weight.T).float()  # [C, V]
        if vocabulary is None:
            losses[part] = torch.nn.functional.cross_entropy(logits, targets[part], reduction="none")
        else:
            valid = targets[part] != IGNORE  # [C]
            target = torch.where(valid, targets[part], 0)[:, None]  # [C, 1]
            log_sum, chosen, _, _ = _over_shards(logits, target, vocabulary)
            losses[part] = torch.where(valid, (log_sum - chosen).squeeze(1), 0.0)
    return losses


def _over_shards(
    logits: Tensor, target: Tensor, vocabulary: VocabularyShard
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From a shard's logits [C, V_shard] and ``target`` int64 [C, 1]: log-sum-exp and target logit over the
    whole vocabulary, the target's column in this shard, and whether it is in this shard; [C, 1] each."""
    column = target - vocabulary.first
    here = (column >= 0) & (column < logits.shape[1])
    column = torch.where(here, column, 0)
    log_sum = logits.logsumexp(dim=1, keepdim=True)
    top = vocabulary.maximum(log_sum.clone())
    logit = torch.where(here, logits.gather(1, column), 0.0)  # [C, 1]
    both = vocabulary.total(torch.cat(((log_sum - top).exp(), logit), dim=1))  # [C, 2]
    return top + both[:, :1].log(), both[:, 1:], column, here


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the token losses of ``hidden`` [N, D], ``weight`` [V, D] and ``targets`` [N]. The forward pass
    computes the gradients for a unit output gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int,
        z_loss: float,
        step: LossKernels,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        cast_weight = weight.to(hidden.dtype)
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # [N, D]
        weight_grad: Tensor | None = None  # [V, D]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        # Reused by every chunk: fresh memory of this size costs a page fault for each 4 KiB.
        logits = hidden.new_empty(min(chunk, len(targets)), weight.shape[0])  # [C, V]
        product = torch.empty_like(cast_weight) if ctx.needs_input_grad[1] else None  # [V, D]
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            out = logits[: len(targets[part])]
            logit = torch.mm(hidden[part], cast_weight.T, out=out)
            losses, grad = step.softmax_gradient(logit, targets[part], z_loss)  # [C, V]
            total += losses
            if hidden_grad is not None:
                torch.mm(grad, cast_weight, out=hidden_grad[part])
            if product is not None:
                torch.mm(grad.T, hidden[part], out=product)
                if weight_grad is None:
                    weight_grad = product.to(torch.float32, copy=True)
                else:
                    step.accumulate(weight_grad, product)
        if product is not None and weight_grad is None:  # no targets
            weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        ctx.grads = hidden_grad, weight_grad
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor | None, ...]:
        (output_grad,) = output_grads
        assert ctx.grads is not None, "a second backward pass would scale the gradients twice"
        hidden_grad, weight_grad = ctx.grads
        ctx.grads = None
        if hidden_grad is not None:
            hidden_grad = hidden_grad.mul_(output_grad)
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(output_grad).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None, None, None


def softmax_gradient(
    logits: Tensor, targets: Tensor, z_loss: float, vocabulary: VocabularyShard | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of the losses, float32 [], of logits [C, V] against ``targets`` int64 [C], and its gradient with
    respect to the logits, [C, V] in their dtype."""
    valid = targets != IGNORE  # [C]
    target = torch.where(valid, targets, 0)[:, None]  # [C, 1]
    if vocabulary is None and logits.dtype == torch.bfloat16 and logits.device.type != "cpu":
        # The same in fewer passes over memory. On a CPU it would change recorded losses in their last bits.
        grad = torch.log_softmax(logits, dim=1, dtype=torch.float32)  # [C, V]
        losses = -grad.gather(1, target)  # [C, 1]
        log_sum = logits.gather(1, target).float() + losses
        scale = valid[:, None] * (1 + 2 * z_loss * log_sum)
        grad.exp_().mul_(scale).scatter_add_(1, target, -valid[:, None].float())
        return (torch.where(valid[:, None], losses + z_loss * log_sum**2, 0.0)).sum(), logits.copy_(grad)
    grad = logits.float()  # [C, V]
    minus_one: Tensor | float = -1.0
    if vocabulary is None:
        log_sum = grad.logsumexp(dim=1, keepdim=True)  # [C, 1]
        chosen = grad.gather(1, target)  # [C, 1]
    else:
        log_sum, chosen, target, here = _over_shards(grad, target, vocabulary)
        minus_one = -here.float()
    losses = (log_sum - chosen).squeeze(1)  # [C]
    # Overwrites the caller's logits if they are float32, as kernels do with theirs.
    grad.sub_(log_sum).exp_()  # softmax
    if z_loss:
        losses = losses + z_loss * log_sum.squeeze(1) ** 2
        grad.mul_(1 + 2 * z_loss * log_sum)
    grad.scatter_add_(1, target, minus_one * torch.ones_like(log_sum))
    return torch.where(valid, losses, 0.0).sum(), grad.mul_(valid[:, None]).to(logits.dtype)


def _accumulate(total: Tensor, value: Tensor) -> None:
    total += value
