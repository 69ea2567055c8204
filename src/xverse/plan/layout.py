"""How a run is laid out over GPUs, and what does not fit together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from xverse.model.config import XverseConfig

Checkpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder as the cost model sees it. ``gated``: SwiGLU's three matrices instead of two."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    gated: bool = True
    tied: bool = False

    @classmethod
    def of(cls, shape: XverseConfig) -> Architecture:
        return cls(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            layers=shape.num_hidden_layers,
            heads=shape.num_attention_heads,
            kv_heads=shape.num_attention_heads,
        )

    @property
    def kv_size(self) -> int:
        return self.hidden_size // self.heads * self.kv_heads

    @property
    def layer_parameters(self) -> int:
        """Of one layer's matrices; norms and biases are left out."""
        d = self.hidden_size
        attention = 2 * d * d + 2 * d * self.kv_size
        return attention + (3 if self.gated else 2) * d * self.intermediate_size

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        ends = self.head_parameters * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + ends

    def flops_per_token(self, length: int, causal: bool = False) -> float:
        """Of training, forward and backward: 6 for each parameter but the embedding's, and attention counted
        full (12 · layers · d · T) or causal (half of that)."""
        attention = 12 * self.layers * self.hidden_size * length
        matrices = self.layers * self.layer_parameters + self.head_parameters
        return 6 * matrices + attention / (2 if causal else 1)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of parallelism; their product is the number of GPUs.

    ``shard`` GPUs share parameters, gradients and optimizer states (FSDP), ``replicate`` groups of them hold
    the same (with ``shard`` above 1: HSDP, else DDP). ``tensor`` includes sequence parallelism. Each of the
    ``pipeline`` stages holds ``virtual_stages`` runs of layers (interleaved 1F1B). ``micro_batch`` is in
    sequences of one data-parallel rank, ``accumulate`` how many of them make a step there.
    """

    shard: int = 1
    replicate: int = 1
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    virtual_stages: int = 1
    micro_batch: int = 1
    accumulate: int = 1
    checkpointing: Checkpointing = "none"

    @property
    def gpus(self) -> int:
        return self.shard * self.replicate * self.tensor * self.context * self.pipeline

    @property
    def data(self) -> int:
        """Ranks that see different sequences."""
        return self.shard * self.replicate

    @property
    def sharded_over(self) -> int:
        """GPUs that share one copy of a stage's states: context parallelism's hold the same weights, and
        FSDP shards over them too."""
        return self.shard * self.context if self.shard > 1 else 1

    @property
    def compiles(self) -> bool:
        """Whether the trainer can compile the layers: torch.compile goes neither with its selective
        checkpointing nor with its tensor parallelism."""
        return self.checkpointing != "selective" and self.tensor == 1

    @property
    def sequences(self) -> int:
        """Of one step, over all."""
        return self.data * self.micro_batch * self.accumulate

    def __str__(self) -> str:
        parts = []
        if self.shard > 1 and self.replicate > 1:
            parts.append(f"HSDP {self.replicate} × {self.shard}")
        elif self.shard > 1:
            parts.append(f"FSDP {self.shard}")
        elif self.replicate > 1:
            parts.append(f"DDP {self.replicate}")
        for name in ("tensor", "context", "pipeline"):
            if getattr(self, name) > 1:
                parts.append(f"{name} {getattr(self, name)}")
        if self.virtual_stages > 1:
            parts.append(f"{self.virtual_stages} virtual stages each")
        parts.append(f"micro-batch {self.micro_batch} × {self.accumulate}")
        parts.append(f"checkpointing {self.checkpointing}")
        return ", ".join(parts)

    def keys(self) -> dict[str, int | str]:
        return dataclasses.asdict(self)


def problem(arch: Architecture, layout: Layout, length: int, gpus_per_machine: int) -> str:
    """Why the trainer cannot run a layout, with the numbers; an empty string where it can. The rules are
    those of ``train/layout.py``, and that tensor parallelism stays within a machine."""
    tensor, context, stages = layout.tensor, layout.context, layout.pipeline * layout.virtual_stages
    for name in ("heads", "kv_heads", "intermediate_size", "hidden_size"):
        if getattr(arch, name) % tensor:
            return f"{name} {getattr(arch, name)} does not divide by tensor {tensor}"
    if tensor > gpus_per_machine:
        return f"tensor {tensor} reaches beyond one machine of {gpus_per_machine} GPUs"
    if context > 1 and length % (2 * context):
        return f"a sequence of {length} does not divide into {2 * context} chunks of context {context}"
    if length // context % tensor:
        return f"a sequence of {length} does not divide by context {context} × tensor {tensor}"
    if arch.layers % stages:
        return f"{arch.layers} layers do not divide into {stages} pipeline stages"
    batches = layout.accumulate
    if batches < layout.pipeline or batches % max(1, batches // layout.pipeline):
        return (
            f"pipeline {layout.pipeline} needs a multiple of {layout.pipeline} micro-batches, not {batches}"
        )
    return ""
