"""Tensor and sequence parallelism by DTensor: every matrix is sharded over several processes, as is the
sequence between the matrices (Korthikanti et al., 2022, arXiv:2205.05198); the loss over a sharded
vocabulary."""

from __future__ import annotations

import logging
import types
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from xverse.model import AttentionContext, XverseForCausalLM, linear_cross_entropy
from xverse.plan.layout import BY_INPUTS, BY_OUTPUTS, vocabulary_part

# It warns that gathering a matrix that FSDP shards too is slow; that happens only to gather the whole model.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def shard_tensors(model: XverseForCausalLM, mesh: DeviceMesh) -> None:
    """Shard every parameter of ``model`` over the one-dimensional ``mesh``, in place.

    Between the layers each process holds its part of the sequence, [B, T/n, D]; attention and MLP see the
    whole sequence and a share of the heads and columns. ``model.loss`` still takes whole rows [B, T] and
    returns the whole loss in every process. Norms see parts of the sequence, so their gradients are partial
    sums.
    """
    layer = {
        "input_layernorm": SequenceParallel(),
        "self_attn": _WholeSequence(),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": _WholeSequence(),
        **{name: ColwiseParallel() for name in BY_OUTPUTS},
        **{name: RowwiseParallel(output_layouts=Shard(1)) for name in BY_INPUTS},
    }
    if model.config.qk_norm:  # each process norms its heads
        own_heads = SequenceParallel(sequence_dim=2, use_local_output=True)
        layer |= {"self_attn.q_norm": own_heads, "self_attn.k_norm": own_heads}
    for block in model.model.layers:
        parallelize_module(block, mesh, layer)
    ends = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(),
    }
    present = dict(model.named_modules())
    parallelize_module(model, mesh, {name: style for name, style in ends.items() if name in present})
    if "lm_head" in present:
        model.tie()
    model.loss = types.MethodType(_loss, model)  # type: ignore[method-assign]


def head_loss(head: nn.Linear, hidden: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    """Sum of the token losses, float32 [], of normed ``hidden`` [B, T, D] against ``targets`` int64 [B, T].
    ``hidden`` may be sharded over the sequence and the head over the vocabulary (DTensors)."""
    weight: Tensor = head.weight
    vocabulary = None
    if isinstance(weight, DTensor):
        assert isinstance(hidden, DTensor)
        hidden = _cast(hidden).redistribute(placements=[Replicate()])
        hidden = hidden.to_local(grad_placements=[Partial()])  # [B, T, D]
        vocabulary = _Vocabulary(weight)
        weight = weight.to_local()
    return linear_cross_entropy(
        hidden.flatten(0, 1), weight, targets.flatten(), reduction="sum", z_loss=z_loss, vocabulary=vocabulary
    )


def _loss(
    model: XverseForCausalLM, tokens: Tensor, targets: Tensor, context: AttentionContext, z_loss: float = 0.0
) -> Tensor:
    return head_loss(model.lm_head, model.model(tokens, context), targets, z_loss)


class _WholeSequence(ParallelStyle):
    """Gathers a module's first input, [B, T/n, D] → [B, T, D], in the dtype of its matmuls."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def gather(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return _cast(inputs[0]).redistribute(placements=[Replicate()]), *inputs[1:]

        module.register_forward_pre_hook(gather)
        return module


def _cast(x: DTensor) -> DTensor:
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x  # type: ignore


class _Vocabulary:
    """A ``VocabularyShard`` of the head's DTensor."""

    def __init__(self, weight: DTensor) -> None:
        mesh = weight.device_mesh
        self._group = mesh.get_group()
        self.rows = len(vocabulary_part(weight.shape[0], 0, mesh.size()))
        self.first = self.rows * mesh.get_local_rank()

    def maximum(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, dist.ReduceOp.MAX, self._group)
        return x

    def total(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self._group)
        return x
