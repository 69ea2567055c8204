"""Bytes that a process of a pretraining run holds: the planner's estimate for a GPU, and the prediction that
the trainer makes from what it counts on one layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from xverse.model.chunks import logit_bytes
from xverse.plan.layout import Architecture, Checkpointing, Layout

_CONTEXT = 1.5e9  # CUDA, NCCL and the libraries' workspaces
_FRAGMENTS = 0.04  # of what is allocated: the allocator's rounding and gaps


@dataclass(frozen=True)
class Memory:
    """Bytes by kind. ``gathered``: layers and ends that FSDP holds whole for a moment."""

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
    """Bytes that autograd keeps of one token and layer in bfloat16, as ``train/memory.py`` counts them."""
    d, f, q, kv = arch.hidden_size, arch.intermediate_size, arch.attention_size, arch.kv_size
    # In bfloat16 attention keeps rotated queries and keys, values and its output, also transposed.
    attention = {"none": 6 * q + 4 * kv, "selective": 4 * q + 4 * kv, "full": 0}[checkpointing]
    rest = {"none": 24 * d + 10 * f, "selective": 8 * d + 6 * f, "full": 4 * d}[checkpointing]
    return attention + rest


def _first_stage(arch: Architecture, layout: Layout) -> tuple[float, float, float]:
    """Layers of the first pipeline stage, which holds the most micro-batches; and of one tensor-parallel
    rank there, the parameters of a layer and of the ends (embedding and, without a pipeline, the head)."""
    ends = arch.end_parameters if layout.pipeline == 1 else arch.head_parameters
    return arch.layers / layout.pipeline, arch.layer_parameters / layout.tensor, ends / layout.tensor


def memory(arch: Architecture, layout: Layout, length: int) -> Memory:
    """The planner's estimate for a GPU of the first pipeline stage, under bfloat16 compute with float32
    parameters, gradients and AdamW's moments."""
    layers, layer, ends = _first_stage(arch, layout)
    states = (layers * layer + ends) / layout.sharded_over
    tokens = layout.micro_batch * length / layout.context / layout.tensor
    per_layer = activation_bytes(arch, layout.checkpointing)
    activations = layout.in_flight * tokens * layers * per_layer
    if layout.checkpointing != "none":  # the layer whose backward pass runs is whole
        activations += tokens * (activation_bytes(arch, "none") - per_layer)
    gathered = 0.0
    if layout.shard > 1:  # two layers in bfloat16 and one's gradients; the ends in float32, with gradients
        gathered = (2 * 2 + 4) * layer + 2 * 4 * ends
        # torch's pipeline schedule keeps weights and gradients whole until the last micro-batch.
        if layout.pipeline > 1:
            gathered = layers * (2 + 4) * layer + 2 * 4 * ends
    rows = layout.micro_batch * length // layout.context
    logits = logit_bytes(rows, arch.vocab_size // layout.tensor, "cuda") + 4 * rows * arch.hidden_size
    moments = states / layout.data if layout.zero1 else states
    sizes = (4 * states, 4 * states, 8 * moments, gathered, activations, logits)
    return Memory(*sizes, reserved=_CONTEXT + _FRAGMENTS * sum(sizes))


@dataclass(frozen=True, kw_only=True)
class Work:
    """What decides a training step's memory besides its layout: what it computes in and on, and what autograd
    keeps of one micro-batch of a context rank, in bytes: ``kept`` of the layers of one pipeline stage,
    ``layer`` of one layer without recomputation."""

    kept: int
    layer: int
    parallel: str = "none"
    half: bool = True
    muon: bool = False
    moment_bytes: int = 4
    device: str = "cpu"
    kernels: bool = False


def training_memory(arch: Architecture, layout: Layout, length: int, work: Work) -> dict[str, int]:
    """Bytes that one process holds at its fullest moment, by kind, without what libraries take.

    Three moments may be the fullest: the head's backward pass, when all activations are kept; the first
    layer's, when nearly all gradients exist; and the optimizer's step. Of a pipeline's processes the first
    counts, which holds the most micro-batches; FSDP keeps its weights and gradients whole until the last of
    them. A layer's backward pass holds two and a half times what it keeps. On a CPU a twentieth of all, and
    in float32 two layers' activations, is what glibc holds of freed blocks that do not fit again
    ("allocator"). These shares are fitted to measurements. The last one differs by processor, by a tenth of
    all in float32, because the buffers of its matmuls lie between the blocks.
    """
    layers, layer, ends = _first_stage(arch, layout)
    end, pipeline = arch.head_parameters / layout.tensor, layout.pipeline
    parameters = layers * layer + ends
    share = layout.shard * layout.context if work.parallel == "fsdp" else 1
    size = 2 if work.half else 4
    moments = 2 * parameters - (layers * layer if work.muon else 0)
    held = 4 * parameters / share
    # FSDP holds the ends all the time, and two layers under way.
    if work.parallel == "fsdp" and layout.replicate * share > 1:
        held += 4 * ends + size * layer * (2 if pipeline == 1 else layers)
    fixed = {"parameters": held, "optimizer": work.moment_bytes * moments / share}
    accumulated = 0.0
    if layout.accumulate > 1 or work.parallel == "ddp":  # DDP's buckets
        accumulated = 4 * parameters / (share if pipeline == 1 else 1)
    rows = layout.micro_batch * length // layout.context
    logits = logit_bytes(rows, arch.vocab_size // layout.tensor, work.device, work.kernels)
    head = {
        # The head's are made in the forward pass, scaled in the backward.
        "gradients": 2 * 4 * end + accumulated,
        "activations": work.kept / layout.tensor * layout.in_flight + 2 * rows * arch.hidden_size * size,
        "logits": logits + (size * end if work.half else 0),
    }
    one = work.layer / layout.tensor
    first = {"gradients": 4 * parameters / share, "activations": 2.5 * one, "logits": 0.0}
    last = {"gradients": 4 * parameters / share, "activations": 0.0, "logits": 0.0}
    fullest = max(head, first, last, key=lambda moment: sum(moment.values()))
    names = ("parameters", "gradients", "optimizer", "activations", "logits")
    predicted = {name: int((fixed | fullest)[name]) for name in names}
    if work.device == "cpu":
        predicted["allocator"] = int(sum(predicted.values()) / 20 + (0 if work.half else 2 * one))
    return predicted
