"""The layers' matrices in FP8 (Micikevicius et al., 2022, arXiv:2209.05433), by torchao on CUDA.

Weights, inputs and gradients are each scaled by their largest value just before a product; parameters, their
gradients and the optimizer stay as they are, and so do embedding, attention, norms and head.
"""

from __future__ import annotations

import torch

from xverse.config import UserError, need
from xverse.model import XverseConfig, XverseForCausalLM
from xverse.train.settings import TrainConfig

CAPABILITY = (8, 9)  # Ada, the first with products in FP8
ALIGNED = 16  # what every side of such a product must divide by


def check_float8(
    config: TrainConfig, shape: XverseConfig, device: torch.device | None = None, length: int = 0
) -> None:
    """Raises UserError where the run wants FP8 and its shape, its ``length`` of sequences, or the ``device``
    (None: not looked at) does not have it."""
    if not config.float8:
        return
    sides = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "sequence_length / context": length // config.context,
    }
    for name, side in sides.items():
        if side % ALIGNED:
            raise UserError(f"float8: {name} {side} does not divide by {ALIGNED}")
    if device is None:
        return
    wanted = "float8 needs a CUDA GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell)"
    if device.type != "cuda":
        raise UserError(f"{wanted}, and there is none here; leave train.float8 out")
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"{wanted}; {name} has {'.'.join(map(str, capability))}; leave train.float8 out")
    need("torchao", "fp8", "train.float8", load=False)


def convert_layers(model: XverseForCausalLM, device: torch.device) -> None:
    """Let the matrices of ``model``'s layers compute in FP8, in place; parameters and their names stay.
    Without CUDA it is emulated: values are rounded to FP8 and multiplied in their own type."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    how = Float8LinearConfig(emulate=device.type != "cuda")
    for layer in model.model.layers:
        convert_to_float8_training(layer, config=how)
