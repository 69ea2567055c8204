"""Layouts: how many processes share what. Arithmetic and checks only; ``parallel.py`` applies them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

from xverse.config import UserError
from xverse.model import XverseConfig
from xverse.train.settings import TrainConfig


@dataclass(frozen=True)
class Layout:
    """Degrees, the outermost first; their product is the number of processes. Neighbours in ``tensor`` and
    ``context`` are neighbours in rank: they talk most.

    ``replicate`` × ``shard`` groups of processes have different rows of a batch; parameters are sharded over
    ``shard`` × ``context`` and, in another dimension, over ``tensor``.
    """

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    virtual_stages: int = 1

    @property
    def data(self) -> int:
        """How many shares the rows of a batch are divided into."""
        return self.replicate * self.shard

    def place(self, rank: int) -> tuple[int, int, int, int]:
        """A process's place in the pipeline, among those with other rows, in its context and its tensors."""
        rank, tensor = divmod(rank, self.tensor)
        rank, context = divmod(rank, self.context)
        pipeline, data = divmod(rank, self.data)
        return pipeline, data, context, tensor

    @property
    def processes(self) -> int:
        return self.pipeline * self.data * self.context * self.tensor

    @property
    def stages(self) -> int:
        return self.pipeline * self.virtual_stages

    def __str__(self) -> str:
        names = ("pipeline", "replicate", "shard", "context", "tensor")
        return " × ".join(f"{name} {getattr(self, name)}" for name in names if getattr(self, name) > 1) or "1"


def layout_of(config: TrainConfig, processes: int, shape: XverseConfig, length: int | None = None) -> Layout:
    """The layout of a recipe on a number of processes, checked against the model and, where its ``length`` is
    given, the sequence. Raises UserError that says what does not divide, and the nearest layout that works.
    """
    if config.parallel == "none":
        layout = Layout()
    elif config.parallel == "ddp":
        layout = Layout(replicate=processes)
    else:
        degrees = (config.pipeline, config.replicate, config.context, config.tensor)
        shard = max(1, processes // math.prod(degrees))
        virtual = config.virtual_stages if config.pipeline > 1 else 1
        layout = Layout(config.pipeline, config.replicate, shard, config.context, config.tensor, virtual)
        if layout.processes != processes:
            wanted = str(dataclasses.replace(layout, shard=1))
            wanted += f" = {math.prod(degrees)}" if "×" in wanted else ""
            raise UserError(
                f"{wanted} does not divide {processes} processes"
                + _nearest(layout, config, processes, shape, length)
            )
    found = problem(layout, config, shape, length)
    if found:
        raise UserError(found + _nearest(layout, config, processes, shape, length))
    return layout


def problem(layout: Layout, config: TrainConfig, shape: XverseConfig, length: int | None) -> str:
    """What does not divide, or an empty string."""
    if config.batch_ramp_start % layout.data:
        return f"batch_ramp_start {config.batch_ramp_start} does not divide into {layout.data} processes"
    rows, left = divmod(config.batch_size, layout.data)
    micro = config.micro_batch_size or rows
    if left or not rows or rows % micro:
        return f"batch_size {config.batch_size} does not divide into {layout.data} processes" + (
            f" of micro-batches of {config.micro_batch_size}" if config.micro_batch_size else ""
        )
    for name in ("num_attention_heads", "intermediate_size", "hidden_size"):
        if getattr(shape, name) % layout.tensor:
            return f"{name} {getattr(shape, name)} does not divide by tensor {layout.tensor}"
    if shape.num_hidden_layers % layout.stages:
        return (
            f"num_hidden_layers {shape.num_hidden_layers} do not divide into pipeline {layout.pipeline} × "
            f"virtual_stages {layout.virtual_stages} = {layout.stages} stages"
        )
    if length is not None and layout.context > 1 and length % (2 * layout.context):
        return (
            f"sequence_length {length} does not divide into 2 × context {layout.context} = "
            f"{2 * layout.context} chunks"
        )
    if length is not None and length // layout.context % layout.tensor:
        return (
            f"sequence_length {length} does not divide by context {layout.context} × tensor {layout.tensor}"
        )
    batches = rows // micro
    if batches < layout.pipeline:
        return (
            f"pipeline {layout.pipeline} needs at least {layout.pipeline} micro-batches, but the {rows} rows "
            f"of a process are {batches} of micro_batch_size {micro}"
        )
    if batches % (batches // layout.pipeline):
        return (
            f"pipeline {layout.pipeline} goes round {batches // layout.pipeline} times, into which "
            f"{batches} micro-batches of micro_batch_size {micro} do not divide"
        )
    return ""


def _nearest(
    wanted: Layout, config: TrainConfig, processes: int, shape: XverseConfig, length: int | None
) -> str:
    """The layout that works and is the fewest doublings away from ``wanted``, in words."""
    if config.parallel == "ddp":
        return ""
    best: tuple[float, Layout, TrainConfig] | None = None
    divisors = [n for n in range(1, processes + 1) if processes % n == 0]
    sizes = {
        config.micro_batch_size,
        *(n for n in range(1, config.batch_size + 1) if not config.batch_size % n),
    }
    given = config.micro_batch_size or max(1, config.batch_size // wanted.data)
    for micro in sorted({config.micro_batch_size, *sizes}):
        tried = dataclasses.replace(config, micro_batch_size=micro)
        for degrees in itertools.product(divisors, repeat=4):
            if processes % math.prod(degrees):
                continue
            pipeline, replicate, context, tensor = degrees
            shard = processes // math.prod(degrees)
            for virtual in sorted({wanted.virtual_stages, 1}) if pipeline > 1 else [1]:
                layout = Layout(pipeline, replicate, shard, context, tensor, virtual)
                if problem(layout, tried, shape, length):
                    continue
                pairs = [(a, b) for a, b in zip(_degrees(layout), _degrees(wanted), strict=True)]
                away = sum(abs(math.log2(a / b)) for a, b in pairs)
                if micro != config.micro_batch_size:
                    away += 0.5 + 0.01 * abs(math.log2(micro / given))
                if best is None or away < best[0]:
                    best = away, layout, tried
    if best is None:
        return ""
    _, layout, tried = best
    names = ("pipeline", "virtual_stages") if layout.pipeline > 1 else ("pipeline",)
    says = [f"{name}: {getattr(layout, name)}" for name in (*names, "replicate", "context", "tensor")]
    if tried.micro_batch_size != config.micro_batch_size:
        says.append(f"micro_batch_size: {tried.micro_batch_size}")
    return f"; the nearest that works on {processes}: {', '.join(says)}"


def _degrees(layout: Layout) -> tuple[int, ...]:
    return layout.pipeline, layout.virtual_stages, layout.replicate, layout.context, layout.tensor
