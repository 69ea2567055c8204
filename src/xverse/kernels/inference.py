"""A model's plain layers on the CPU, computed in our kernels while no gradients are recorded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xverse.kernels import ops
from xverse.model.transformer import MLP, Attention, RMSNorm


class BF16Linear(nn.Linear):
    """``nn.Linear`` in bfloat16: up to 8 tokens at the speed of memory."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        run = ops.linear_bf16 if ops.direct(x) else torch.ops.xverse.linear_bf16
        return run(x, self.weight)


class FusedRMSNorm(RMSNorm):
    """The norm in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        run = ops.rms_norm if ops.direct(x) else torch.ops.xverse.rms_norm
        return run(x, self.weight, self.eps)


class FusedMLP(MLP):
    """The gated activation in one pass, rounded once."""

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().activate(gate, up)
        run = ops.silu_mul if ops.direct(gate) else torch.ops.xverse.silu_mul
        return run(gate, up)


class FusedAttention(Attention):
    """The rotation of queries and keys in place, rounded once."""

    def rotate(self, q: Tensor, k: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            return super().rotate(q, k, rope)
        run = ops.rotate_ if ops.direct(q) else torch.ops.xverse.rotate_
        run(q, k, *rope)
        return q.transpose(1, 2), k.transpose(1, 2)


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    RMSNorm: FusedRMSNorm,
    MLP: FusedMLP,
    Attention: FusedAttention,
}


def use_kernels(model: nn.Module) -> None:
    """Let the layers of ``model`` compute in our kernels, in place; parameters and their names stay.

    Nothing changes on other devices than the CPU. Results differ from the plain layers by rounding: what is
    made in several rounded steps there is rounded once here.
    """
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    if device.type != "cpu":
        return
    for module in model.modules():
        if type(module) in _FUSED:
            module.__class__ = _FUSED[type(module)]
        elif type(module) is nn.Linear and module.bias is None and module.weight.dtype == torch.bfloat16:
            module.__class__ = BF16Linear
