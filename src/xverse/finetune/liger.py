"""LinkedIn's Liger kernels on CUDA for norms and gated activations.

``model/loss.py`` already fuses the loss with the output head, so Liger's fused loss is not used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xverse.config import UserError, need
from xverse.model.transformer import MLP, RMSNorm


def use_liger(model: nn.Module) -> None:
    """Replace the norms and gated activations of ``model`` by Liger's kernels, in place.

    Raises UserError without CUDA or liger-kernel.
    """
    if not torch.cuda.is_available():
        raise UserError("use_liger_kernel needs CUDA; omit it on this device")
    need("liger_kernel", "gpu", "use_liger_kernel", load=False)
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    class LigerRMSNorm(RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            # "gemma" computes in float32 up to and including the weight, like XVERSE's norm.
            result: Any = LigerRMSNormFunction.apply(x, self.weight, self.eps, 0.0, "gemma", False)
            return result

    class LigerMLP(MLP):
        def activate(self, gate: Tensor, up: Tensor) -> Tensor:
            result: Any = LigerSiLUMulFunction.apply(gate, up)
            return result

    kinds: dict[type[nn.Module], type[nn.Module]] = {RMSNorm: LigerRMSNorm, MLP: LigerMLP}
    for module in model.modules():
        if type(module) in kinds:
            module.__class__ = kinds[type(module)]
