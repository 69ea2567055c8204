"""Layouts: how the work of a training run is divided over processes, one for each GPU. Arithmetic only;
``train/parallel.py`` applies a layout to the model."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from xverse.config import UserError
from xverse.model.config import XverseConfig, training_flops

Checkpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder as the cost model sees it. ``gated``: SwiGLU's three matrices instead of two; ``head_dim`` 0:
    hidden_size / heads."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    gated: bool = True
    tied: bool = False
    head_dim: int = 0

    @classmethod
    def of(cls, shape: XverseConfig) -> Architecture:
        """Raises UserError for a shape with routed experts."""
        shape.without_experts("plan and pretrain")
        return cls(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            layers=shape.num_hidden_layers,
            heads=shape.num_attention_heads,
            kv_heads=shape.num_key_value_heads,
            tied=shape.tie_word_embeddings,
            head_dim=shape.head_dim,
        )

    @property
    def attention_size(self) -> int:
        """The width of a layer's queries."""
        return (self.head_dim or self.hidden_size // self.heads) * self.heads

    @property
    def kv_size(self) -> int:
        return self.attention_size // self.heads * self.kv_heads

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Shapes of one layer's matrices."""
        d, f, a = self.hidden_size, self.intermediate_size, self.attention_size
        mlp = [(d, f)] * (3 if self.gated else 2)
        return [(d, a), (d, self.kv_size), (d, self.kv_size), (a, d), *mlp]

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer's matrices, without norms and biases."""
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def end_parameters(self) -> int:
        """Parameters of the embedding and the head, which may be one matrix."""
        return self.head_parameters * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.end_parameters

    def flops_per_token(self, length: int) -> dict[str, float]:
        """Training FLOPs per token, see ``training_flops``."""
        matrices = self.layers * self.layer_parameters + self.head_parameters
        return training_flops(matrices, self.layers, self.attention_size, length)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of parallelism; their product is the number of processes.

    ``shard`` processes share parameters, gradients and optimizer states (FSDP), ``replicate`` groups of them
    hold copies (with ``shard`` above 1: HSDP, else DDP); the ``replicate`` × ``shard`` data-parallel ranks
    have different rows of a batch. With ``zero1`` and no ``shard`` they share only optimizer states: ZeRO-1,
    which the trainer cannot do. ``tensor`` includes sequence parallelism. Each of the ``pipeline`` stages
    holds ``virtual_stages`` runs of layers (interleaved 1F1B). A data-parallel rank takes ``accumulate``
    micro-batches of ``micro_batch`` sequences a step.
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
    zero1: bool = False

    @property
    def processes(self) -> int:
        return self.shard * self.replicate * self.tensor * self.context * self.pipeline

    @property
    def data(self) -> int:
        """Data-parallel ranks."""
        return self.shard * self.replicate

    @property
    def sharded_over(self) -> int:
        """Processes that share one copy of a stage's states. Those of context parallelism hold the same
        weights, and FSDP shards over them too."""
        return self.shard * self.context if self.shard > 1 else 1

    @property
    def stages(self) -> int:
        """Runs of layers over all processes of a pipeline."""
        return self.pipeline * self.virtual_stages

    @property
    def in_flight(self) -> float:
        """Micro-batches whose activations the first pipeline stage holds at once."""
        if self.pipeline == 1:
            return 1.0
        return min(self.accumulate, self.pipeline + (self.pipeline - 1) / self.virtual_stages)

    @property
    def compiles(self) -> bool:
        """Whether the trainer can compile the layers: torch.compile works neither with selective
        checkpointing nor with tensor parallelism."""
        return self.checkpointing != "selective" and self.tensor == 1

    @property
    def sequences(self) -> int:
        """Sequences of one step, over all processes."""
        return self.data * self.micro_batch * self.accumulate

    def place(self, rank: int) -> tuple[int, int, int, int]:
        """A process's pipeline stage, data-parallel rank, context rank and tensor rank. Neighbours in tensor
        and context are neighbours in rank, because they communicate most."""
        rank, tensor = divmod(rank, self.tensor)
        rank, context = divmod(rank, self.context)
        pipeline, data = divmod(rank, self.data)
        return pipeline, data, context, tensor

    @property
    def mesh(self) -> str:
        """The degrees above 1, outermost first: ``pipeline 2 × shard 4``."""
        names = ("pipeline", "replicate", "shard", "context", "tensor")
        return " × ".join(f"{name} {getattr(self, name)}" for name in names if getattr(self, name) > 1) or "1"

    def __str__(self) -> str:
        parts = []
        if self.shard > 1 and self.replicate > 1:
            parts.append(f"HSDP {self.replicate} × {self.shard}")
        elif self.shard > 1:
            parts.append(f"FSDP {self.shard}")
        elif self.replicate > 1:
            parts.append(f"{'ZeRO-1' if self.zero1 else 'DDP'} {self.replicate}")
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


# How tensor parallelism divides a layer's matrices (Shoeybi et al., 2019, arXiv:1909.08053): by outputs where
# each process computes its heads or its columns of the MLP, by inputs where the results are summed.
# The embedding and the head are divided by tokens of the vocabulary.
BY_OUTPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
BY_INPUTS = ("self_attn.o_proj", "mlp.down_proj")
BY_VOCABULARY = ("model.embed_tokens", "lm_head")


def vocabulary_part(vocab_size: int, rank: int, count: int) -> range:
    """The tokens of process ``rank`` of ``count``: equal parts, of which the last ones may be smaller."""
    rows = -(-vocab_size // count)
    return range(min(rows * rank, vocab_size), min(rows * (rank + 1), vocab_size))


class Batch(NamedTuple):
    """Sequences of a step over all processes, of a micro-batch of one process (0: all that it has), and of
    the first step where the batch grows (0: it does not)."""

    size: int
    micro: int = 0
    ramp_start: int = 0


_CONFIG_KEYS = {  # of Architecture's sizes
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "hidden_size": "hidden_size",
}


def problem(
    arch: Architecture, layout: Layout, length: int | None = None, gpus_per_machine: int | None = None
) -> str:
    """Why the trainer cannot run a layout, with the numbers, or an empty string. ``length`` is that of a
    sequence. With ``gpus_per_machine``, tensor parallelism beyond one machine is refused too: it would run,
    but slowly."""
    tensor, context, pipeline = layout.tensor, layout.context, layout.pipeline
    for name, key in _CONFIG_KEYS.items():
        if getattr(arch, name) % tensor:
            return f"{key} {getattr(arch, name)} does not divide by tensor {tensor}"
    if gpus_per_machine is not None and tensor > gpus_per_machine:
        return f"tensor {tensor} exceeds one machine of {gpus_per_machine} GPUs"
    if arch.tied and pipeline > 1:
        return (
            f"pipeline {pipeline} cannot divide a model with tie_word_embeddings: its embedding, in the "
            "first stage, and its head, in the last, are one weight"
        )
    if arch.layers % layout.stages:
        return (
            f"num_hidden_layers {arch.layers} do not divide into pipeline {pipeline} × virtual_stages "
            f"{layout.virtual_stages} = {layout.stages} stages"
        )
    if length is not None and context > 1 and length % (2 * context):
        return f"sequence_length {length} does not divide into 2 × context {context} = {2 * context} chunks"
    if length is not None and length // context % tensor:
        return f"sequence_length {length} does not divide by context {context} × tensor {tensor}"
    batches = layout.accumulate
    if batches < pipeline:
        return (
            f"pipeline {pipeline} needs at least {pipeline} micro-batches, but the "
            f"{layout.micro_batch * batches} rows of a process are {batches} of micro_batch_size "
            f"{layout.micro_batch}"
        )
    if batches % (batches // pipeline):
        return (
            f"pipeline {pipeline} needs {batches // pipeline} equal rounds, into which {batches} "
            f"micro-batches of micro_batch_size {layout.micro_batch} do not divide"
        )
    return ""


def with_batch(layout: Layout, batch: Batch) -> Layout | str:
    """``layout`` with the micro-batches of ``batch``, or why the batch does not divide."""
    if batch.ramp_start % layout.data:
        return f"batch_ramp_start {batch.ramp_start} does not divide into {layout.data} processes"
    rows, rest = divmod(batch.size, layout.data)
    micro = batch.micro or rows
    if rest or not rows or rows % micro:
        fault = f"batch_size {batch.size} does not divide into {layout.data} processes"
        return fault + (f" of micro-batches of {batch.micro}" if batch.micro else "")
    return replace(layout, micro_batch=micro, accumulate=rows // micro)


def arrange(
    requested: Layout,
    processes: int,
    batch: Batch,
    arch: Architecture,
    length: int | None = None,
    gpus_per_machine: int | None = None,
    fsdp: bool = True,
) -> Layout:
    """The ``requested`` degrees on a number of processes, with FSDP over what they leave.

    Raises UserError that says what does not divide, and under FSDP the nearest layout that works.
    """
    layout = replace(requested, shard=max(1, processes // requested.processes)) if fsdp else requested
    arranged: Layout | str
    if layout.processes != processes:
        product = f" = {requested.processes}" if "×" in requested.mesh else ""
        arranged = f"{requested.mesh}{product} does not divide {processes:,} processes"
    else:
        arranged = with_batch(layout, batch)
        if isinstance(arranged, Layout):
            arranged = problem(arch, arranged, length, gpus_per_machine) or arranged
    if isinstance(arranged, Layout):
        return arranged
    nearest = _nearest(layout, processes, batch, arch, length, gpus_per_machine) if fsdp else ""
    raise UserError(arranged + nearest)


def _nearest(
    requested: Layout,
    processes: int,
    batch: Batch,
    arch: Architecture,
    length: int | None,
    gpus_per_machine: int | None,
) -> str:
    """The layout that works and is the fewest doublings away from ``requested``, for an error message."""
    best: tuple[float, Layout] | None = None
    given = batch.micro or max(1, batch.size // requested.data)
    sizes = {batch.micro, *divisors(batch.size)}
    for micro, degrees in itertools.product(sorted(sizes), itertools.product(divisors(processes), repeat=4)):
        if processes % math.prod(degrees):
            continue
        chosen: dict[str, Any] = dict(
            zip(("pipeline", "replicate", "context", "tensor"), degrees, strict=True)
        )
        shard = processes // math.prod(degrees)
        for virtual in sorted({requested.virtual_stages, 1}) if chosen["pipeline"] > 1 else [1]:
            layout = with_batch(
                replace(requested, shard=shard, virtual_stages=virtual, **chosen), batch._replace(micro=micro)
            )
            if isinstance(layout, str) or problem(arch, layout, length, gpus_per_machine):
                continue
            pairs = zip(_degrees(layout), _degrees(requested), strict=True)
            distance = sum(abs(math.log2(a / b)) for a, b in pairs)
            if micro != batch.micro:
                distance += 0.5 + 0.01 * abs(math.log2(micro / given))
            if best is None or distance < best[0]:
                best = distance, layout if micro != batch.micro else replace(layout, micro_batch=0)
    if best is None:
        return ""
    layout = best[1]
    values = dict(zip(_DEGREES, _degrees(layout), strict=True))
    if layout.pipeline == 1:
        del values["virtual_stages"]
    if layout.micro_batch:
        values["micro_batch_size"] = layout.micro_batch
    advice = ", ".join(f"{name}: {value}" for name, value in values.items())
    return f"; the nearest that works on {processes}: {advice}"


_DEGREES = ("pipeline", "virtual_stages", "replicate", "context", "tensor")


def _degrees(layout: Layout) -> list[int]:
    return [getattr(layout, name) for name in _DEGREES]


def divisors(number: int, most: int | None = None) -> list[int]:
    """The divisors of a number, up to ``most``."""
    return [n for n in range(1, min(number, most or number) + 1) if number % n == 0]
