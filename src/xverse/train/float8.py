"""The layers' matrices in FP8 (Micikevicius et al., 2022, arXiv:2209.05433), by torchao on CUDA.

Weights, inputs and gradients are each scaled by their largest value just before a product. Parameters, their
gradients, the optimizer, embedding, attention, norms and head are unchanged.
"""

from __future__ import annotations

import torch

from xverse.config import UserError, need
from xverse.model import XverseConfig, XverseForCausalLM
from xverse.train.settings import TrainConfig

CAPABILITY = (8, 9)  # Ada, the first with FP8 matmuls
ALIGNED = 16  # every dimension of an FP8 matmul must be a multiple


def check_float8(
    config: TrainConfig, shape: XverseConfig, device: torch.device | None = None, length: int = 0
) -> None:
    """Raises UserError where the run sets ``float8`` but its shape, its sequence ``length`` or its ``device``
    (None: not checked) does not support it."""
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
    needs = "float8 needs a CUDA GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell)"
    if device.type != "cuda":
        raise UserError(f"{needs}, and there is none here; remove train.float8")
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"{needs}; {name} has {'.'.join(map(str, capability))}; remove train.float8")
    need("torchao", "fp8", "train.float8", load=False)


def convert_layers(model: XverseForCausalLM, device: torch.device) -> None:
    """Make the linear layers of ``model``'s blocks compute in FP8, in place; parameters keep their names.
    Without CUDA FP8 is emulated: values are rounded to FP8 and multiplied in their original dtype."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    how = Float8LinearConfig(emulate=device.type != "cuda")
    for layer in model.model.layers:
        convert_to_float8_training(layer, config=how)
