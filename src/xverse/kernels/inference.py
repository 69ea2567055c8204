"""The unquantised layers of a model, computed in kernels while no gradients are recorded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xverse.gpu import has_triton
from xverse.kernels import ops
from xverse.kernels.bfloat16 import use_fast_products
from xverse.model.transformer import MLP, Attention, RMSNorm


class BF16Linear(nn.Linear):
    """``nn.Linear`` in bfloat16, [..., K] → [..., N]; for up to 8 tokens bound by memory bandwidth."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        run = ops.linear_bf16 if ops.is_eager_cpu(x) else torch.ops.xverse.linear_bf16
        return run(x, self.weight)


class InvariantLinear(nn.Linear):
    """``nn.Linear`` in float32 or bfloat16, [..., K] → [..., N]; the bits of a token depend on that token
    alone."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not ops.is_eager_cpu(x):
            return super().forward(x)
        y = ops.invariant_linear(x, self.weight)
        return y if self.bias is None else y + self.bias


class FusedRMSNorm(RMSNorm):
    """The norm [..., D] → [..., D] in one pass, rounded once."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        run = ops.rms_norm if ops.is_eager_cpu(x) else torch.ops.xverse.rms_norm
        return run(x, self.weight, self.eps)


class FusedMLP(MLP):
    """The gated activation [..., d_ff] in one pass, rounded once."""

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().activate(gate, up)
        run = ops.silu_mul if ops.is_eager_cpu(gate) else torch.ops.xverse.silu_mul
        return run(gate, up)


class FusedAttention(Attention):
    """Rotary embedding of queries and keys [B, T, H, head_dim] in place, rounded once."""

    def rotate(self, q: Tensor, k: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            return super().rotate(q, k, rope)
        run = ops.rotate_ if ops.is_eager_cpu(q) else torch.ops.xverse.rotate_
        run(q, k, *rope)
        return q.transpose(1, 2), k.transpose(1, 2)


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    RMSNorm: FusedRMSNorm,
    MLP: FusedMLP,
    Attention: FusedAttention,
}


def use_kernels(model: nn.Module, batch_invariant: bool = False) -> None:
    """Changes the classes of the layers of ``model`` to ones that compute in kernels; parameters keep their
    names.

    Does nothing on devices other than the CPU and, with Triton, CUDA, where linears stay as they are. Results
    differ from the plain layers by rounding: the kernels round once where the layers round after each of
    several steps. ``batch_invariant``: no product's bits depend on the number of tokens or threads.
    """
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    if device.type != "cpu" and not (device.type == "cuda" and has_triton()):
        return
    if device.type == "cpu" and any(tensor.dtype == torch.bfloat16 for tensor in model.parameters()):
        use_fast_products()
    for module in model.modules():
        if type(module) in _FUSED:
            module.__class__ = _FUSED[type(module)]
        elif device.type == "cpu" and type(module) in _LINEARS:
            module.__class__ = _linear_class(module, batch_invariant)


_LINEARS = (nn.Linear, BF16Linear, InvariantLinear)


def _linear_class(module: nn.Module, batch_invariant: bool) -> type[nn.Linear]:
    half = module.weight.dtype == torch.bfloat16
    if batch_invariant and (half or module.weight.dtype == torch.float32):
        return InvariantLinear
    return BF16Linear if half and module.bias is None else nn.Linear
