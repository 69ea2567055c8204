"""Changes to the layers of a model from outside: kernels, activation checkpointing, compiling."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from xverse.kernels.training import KernelPacked, use_training_kernels
from xverse.model import AttentionContext, Packed, XverseForCausalLM
from xverse.train.context import Ring, RingPacked
from xverse.train.settings import TrainConfig


def prepare_blocks(model: XverseForCausalLM, config: TrainConfig) -> None:
    """Change the layers' ``forward`` in place; parameters keep their names.

    ``activation_checkpointing`` "full" keeps a layer's input only and recomputes the rest in the backward
    pass (Chen et al., 2016); "selective" keeps the results of matmuls and attention too (Korthikanti et al.,
    2022), so that only cheap operations are recomputed. Layers that are not compiled get the CPU kernels.
    """
    if config.compile:
        # Attention holds its layer number, so each layer is compiled separately, for training and validation.
        from torch._dynamo import config as dynamo  # takes seconds to import

        dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * model.config.num_hidden_layers)
    elif takes_kernels(config):
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


def takes_kernels(config: TrainConfig) -> bool:
    """Whether layers get the CPU kernels. Compiled ones do not need them, and DTensors and the hooks that
    make them need plain layers."""
    return not config.compile and config.tensor == 1


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name().partition("::")[2]
    kept = name in ("mm", "bmm", "addmm", "linear", "_scaled_mm") or "attention" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def context_maker(
    compiled: bool, ring: Ring | None = None, device: torch.device | None = None
) -> Callable[[Tensor], AttentionContext]:
    """A function from document ids int [B, T] to ``Packed``, or ``RingPacked`` on a ring, for ``device``
    (default: that of the ids; ids on the CPU save waiting for a GPU). For compiled layers attention stays
    outside the graphs: document lengths differ in each batch and would force recompiling."""
    if ring is not None:
        kind = _uncompiled(RingPacked) if compiled else RingPacked
        return functools.partial(kind, ring=ring, device=device)
    return functools.partial(_uncompiled(Packed) if compiled else KernelPacked, device=device)


@functools.cache
def _uncompiled(kind: Any) -> Any:
    return type(f"Uncompiled{kind.__name__}", (kind,), {"attend": torch.compiler.disable(kind.attend)})
