"""What is done to the layers of a model from outside: kernels, recomputing activations, compiling."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from xverse.model import Packed, XverseForCausalLM
from xverse.quant.training import KernelPacked, use_training_kernels
from xverse.train.settings import TrainConfig


def prepare_blocks(model: XverseForCausalLM, config: TrainConfig) -> None:
    """Change the layers' ``forward``, in place; names of parameters stay.

    ``activation_checkpointing`` "full" keeps a layer's input only and computes the rest again in the backward
    pass (Chen et al., 2016); "selective" keeps the results of matmuls and attention too (Korthikanti et al.,
    2022), so that what is computed twice is cheap. Layers that are not compiled take the kernels for training
    on a CPU.
    """
    if not config.compile:
        use_training_kernels(model)
    for layer in model.model.layers:
        if config.compile:
            layer.forward = torch.compile(layer.forward, dynamic=False)
        if config.activation_checkpointing == "none":
            continue
        extra: dict[str, Any] = {}
        if config.activation_checkpointing == "selective":
            extra["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, **extra
        )


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name().partition("::")[2]
    kept = name in ("mm", "bmm", "addmm", "linear") or "attention" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def context_type(compiled: bool) -> type[Packed]:
    """The attention context; for compiled layers one that stays out of the graphs, since each batch's
    documents are of other lengths and each would be compiled anew."""
    if not compiled:
        return KernelPacked
    return type("UncompiledPacked", (Packed,), {"attend": torch.compiler.disable(Packed.attend)})
