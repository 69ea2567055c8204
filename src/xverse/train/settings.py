"""The ``train:`` section of a recipe."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from xverse.config import UserError
from xverse.model.config import XverseConfig
from xverse.plan.layout import Architecture, Batch, Layout, arrange


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. ``batch_size`` is in sequences per optimizer step, over all processes; a process computes
    ``micro_batch_size`` of them at a time (0: all of its share). ``grad_clip`` is the largest gradient norm
    (0: unlimited). ``validate_every``, ``checkpoint_every`` (0: only at the end) and ``keep_every``
    (checkpoints that are never deleted; 0: none) are in steps.

    ``parallel``: several processes under torchrun, each with the whole model (ddp) or a shard of it (fsdp).
    Under fsdp further degrees can be set: ``tensor`` shards matrices and, between them, the sequence;
    ``context`` the sequence; ``pipeline`` the layers, of which each process has ``virtual_stages`` separate
    runs; ``replicate`` groups of processes hold copies of the shards (HSDP). fsdp shards over the number of
    processes divided by the product of these degrees.

    From ``batch_ramp_start`` (0: no ramp) the batch grows over ``batch_ramp_steps`` to ``batch_size`` in
    equal stages (Brown et al., 2020): early gradients agree, so fewer sequences suffice.

    The wsd schedule decays over the last ``decay_share`` of the steps; the checkpoint before the decay is
    kept, and a run with more ``steps`` continues from it. ``muon`` trains the layers' matrices
    with Muon and the rest with AdamW. ``optimizer_dtype`` is that of the optimizer's states. ``z_loss`` times
    the squared log-sum-exp of the logits is added to each token's loss (PaLM: 1e-4).

    A step is skipped if its loss or gradient norm is not finite, or more than ``skip_zscore`` (0: never)
    standard deviations above the mean of the last ``skip_window`` steps. After ``rollback_after`` skipped
    steps in a row the run restores the weights of its last checkpoint and continues with the next data, at
    most ``max_rollbacks`` times. A process without progress for ``hang_seconds`` (0: unlimited) ends the run.

    ``preflight``: before the first step each process measures its speed; one below ``preflight_share`` of the
    median is named in a warning ("warn") or ends the run ("stop"). ``check_memory``: refuse a run whose
    predicted memory exceeds what is available. One in ``communication_every`` steps (0: none) is profiled for
    exposed communication. ``float8``: the matmuls of the layers in FP8, on CUDA only. ``trackers`` get the
    figures of ``metrics.jsonl`` too."""

    steps: int
    batch_size: int
    learning_rate: float
    micro_batch_size: int = 0
    batch_ramp_start: int = 0
    batch_ramp_steps: int = 0
    parallel: Literal["none", "ddp", "fsdp"] = "none"
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    virtual_stages: int = 2
    replicate: int = 1
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 100
    decay_share: float = 0.2
    final_lr_ratio: float = 0.1
    optimizer: Literal["adamw", "muon"] = "adamw"
    optimizer_dtype: Literal["float32", "bfloat16"] = "float32"
    muon_momentum: float = 0.95
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    z_loss: float = 0.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    float8: bool = False
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    validate_every: int = 0
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    keep_every: int = 0
    log_every: int = 20
    skip_zscore: float = 0.0
    skip_window: int = 64
    rollback_after: int = 3
    max_rollbacks: int = 3
    hang_seconds: float = 1800.0
    preflight: Literal["off", "warn", "stop"] = "warn"
    preflight_share: float = 0.5
    check_memory: bool = True
    communication_every: int = 100
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> Iterator[str]:
        for name, value in dataclasses.asdict(self).items():
            if name in ("beta1", "beta2", "muon_momentum"):
                if not 0 <= value < 1:
                    yield f"{name} must be at least 0 and below 1, not {value}"
            elif name in POSITIVE:
                if not 0 < value < math.inf:
                    yield f"{name} must be positive, not {value}"
            elif not isinstance(value, (str, list)) and not 0 <= value < math.inf:
                yield f"{name} must not be negative, not {value}"
        for name in ("tensor", "context", "pipeline", "replicate"):
            if self.parallel != "fsdp" and getattr(self, name) > 1:
                yield f"{name} {getattr(self, name)} needs parallel: fsdp, not {self.parallel}"
        if not self.preflight_share <= 1:
            yield f"preflight_share must be at most 1, not {self.preflight_share}"
        if not 0 < self.decay_share <= 1:
            yield f"decay_share must be above 0 and at most 1, not {self.decay_share}"
        if self.compile and self.activation_checkpointing == "selective":
            yield "compile does not support activation_checkpointing selective; use none or full"
        if self.compile and self.tensor > 1:  # torch 2.13 loses the type of gradients between graphs
            yield f"compile does not support tensor {self.tensor}; remove one of the two"
        if self.float8 and self.dtype != "bfloat16":
            yield f"float8 needs dtype bfloat16, not {self.dtype}"
        if self.float8 and self.tensor > 1:
            yield f"float8 does not support tensor {self.tensor}; remove one of the two"
        for name in ("micro_batch_size", "batch_ramp_start"):
            part = getattr(self, name)
            if part and self.batch_size % part:
                yield f"batch_size {self.batch_size} is not a multiple of {name} {part}"
        if bool(self.batch_ramp_start) != bool(self.batch_ramp_steps):
            yield "batch_ramp_start and batch_ramp_steps must be set together"
        if self.batch_ramp_steps > self.steps:
            yield f"batch_ramp_steps {self.batch_ramp_steps} exceeds steps {self.steps}"
        if self.batch_ramp_start and self.pipeline > 1:  # its schedule has one number of micro-batches
            yield "batch_ramp_start does not support pipeline; remove one of the two"

    def checkpoint_due(self, done: int) -> bool:
        """Whether a checkpoint is written after ``done`` steps."""
        trunk = self.schedule == "wsd" and done == decay_start(self.steps, self.decay_share)
        return bool(self.checkpoint_every and (trunk or done % self.checkpoint_every == 0))

    def kept_forever(self, step: int) -> bool:
        """Whether the checkpoint after ``step`` steps is never deleted to keep their number small."""
        trunk = self.schedule == "wsd" and step == decay_start(self.steps, self.decay_share)
        return trunk or bool(self.keep_every and step % self.keep_every == 0)

    def rows(self, step: int) -> int:
        """Sequences in the global batch of a step."""
        if step >= self.batch_ramp_steps:
            return self.batch_size
        stages = self.batch_size // self.batch_ramp_start
        return self.batch_ramp_start * (1 + step * (stages - 1) // self.batch_ramp_steps)

    def sequences(self, step: int) -> int:
        """Sequences in the batches of all steps before ``step``."""
        ramp = min(step, self.batch_ramp_steps)
        small = sum(self.rows(earlier) for earlier in range(ramp))
        return small + (step - ramp) * self.batch_size


def decay_start(steps: int, decay_share: float) -> int:
    """The first step of the wsd schedule's decay. A run can be prolonged from the checkpoint before it."""
    return steps - max(1, round(decay_share * steps))


def layout_of(
    config: TrainConfig,
    processes: int,
    shape: XverseConfig,
    length: int | None = None,
    gpus_per_machine: int | None = None,
) -> Layout:
    """The layout of a recipe on a number of processes, checked against the model and, where its ``length`` is
    given, the sequence. Raises UserError that says what does not divide, and the nearest layout that works.
    """
    if config.parallel == "none" and processes > 1:
        raise UserError(
            f"parallel: none, but there are {processes:,} processes; set train.parallel to ddp or fsdp"
        )
    degrees = {name: getattr(config, name) for name in ("replicate", "tensor", "context", "pipeline")}
    if config.parallel == "ddp":
        degrees["replicate"] = processes
    requested = Layout(
        virtual_stages=config.virtual_stages if config.pipeline > 1 else 1,
        checkpointing=config.activation_checkpointing,
        **degrees,
    )
    batch = Batch(config.batch_size, config.micro_batch_size, config.batch_ramp_start)
    fsdp = config.parallel == "fsdp"
    return arrange(requested, processes, batch, Architecture.of(shape), length, gpus_per_machine, fsdp)


POSITIVE = {
    "steps", "batch_size", "learning_rate", "keep_checkpoints", "log_every", "skip_window", "rollback_after",
    "tensor", "context", "pipeline", "virtual_stages", "replicate",
}  # fmt: skip

# Settings that change no loss except by rounding: a run may be resumed with other values of these.
NOT_IDENTITY = {
    "activation_checkpointing", "check_memory", "checkpoint_every", "communication_every", "compile",
    "context", "hang_seconds", "keep_checkpoints", "keep_every", "log_every", "micro_batch_size", "parallel",
    "pipeline", "preflight", "preflight_share", "replicate", "tensor", "trackers", "validate_every",
    "virtual_stages",
}  # fmt: skip
