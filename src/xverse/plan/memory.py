"""Bytes that the fullest GPU holds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from xverse.plan.layout import Architecture, Checkpointing, Layout

_CHUNK = 32 * 2**20  # model/loss.py: float32 logits of one chunk
_CONTEXT = 1.5e9  # CUDA, NCCL and the libraries' workspaces
_FRAGMENTS = 0.04  # of what is allocated: the allocator's rounding and gaps


@dataclass(frozen=True)
class Memory:
    """Bytes by kind. ``gathered``: layers and ends that FSDP has whole for a moment."""

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    logits: float
    reserved: float

    @property
    def total(self) -> float:
        return sum(dataclasses.asdict(self).values())


def activation_bytes(arch: Architecture, checkpointing: Checkpointing) -> float:
    """That autograd keeps of one token and layer in bfloat16, as ``train/memory.py`` counts it."""
    d, f = arch.hidden_size, arch.intermediate_size
    return {"none": 34 * d + 10 * f, "selective": 16 * d + 6 * f, "full": 4 * d}[checkpointing]


def memory(arch: Architecture, layout: Layout, length: int) -> Memory:
    """Of the first pipeline stage's GPUs, which hold the most micro-batches at once, under bfloat16 compute
    with float32 parameters, gradients and AdamW's moments."""
    stages, virtual = layout.pipeline, layout.virtual_stages
    layers = arch.layers / stages
    ends = arch.head_parameters * (2 if stages == 1 else 1)
    owned = (layers * arch.layer_parameters + ends) / layout.tensor
    states = owned / layout.sharded_over
    tokens = layout.micro_batch * length / layout.context / layout.tensor
    held = 1.0 if stages == 1 else min(layout.accumulate, stages * (1 + (stages - 1) / (stages * virtual)))
    per_layer = activation_bytes(arch, layout.checkpointing)
    activations = held * tokens * layers * per_layer
    if layout.checkpointing != "none":  # the layer whose backward pass runs is whole
        activations += tokens * (activation_bytes(arch, "none") - per_layer)
    gathered = 0.0
    if layout.shard > 1:  # two layers in bfloat16 and one's gradients; the ends in float32, with gradients
        gathered = (2 * 2 + 4) * arch.layer_parameters / layout.tensor + 2 * 4 * ends / layout.tensor
        if stages > 1:  # torch's schedule keeps weights and gradients whole until the last micro-batch
            gathered = (layers * (2 + 4) * arch.layer_parameters + 2 * 4 * ends) / layout.tensor
    logits = 2 * _CHUNK + 4 * layout.micro_batch * length / layout.context * arch.hidden_size
    sizes = (4 * states, 4 * states, 8 * states, gathered, activations, logits)
    return Memory(*sizes, reserved=_CONTEXT + _FRAGMENTS * sum(sizes))
