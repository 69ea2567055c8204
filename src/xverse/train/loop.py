"""The training loop: batches by step number, checkpoints, and resuming where a killed run stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xverse.config import UserError
from xverse.data.feed import Batch, prefetch
from xverse.hardware import keep_freed_memory
from xverse.kernels.bfloat16 import use_fast_products
from xverse.log import JsonlLog
from xverse.model import IGNORE, XverseForCausalLM
from xverse.place import Place
from xverse.train import preflight
from xverse.train.checkpoint import Checkpointer, kept, load_checkpoint
from xverse.train.communication import watching
from xverse.train.continuing import find_checkpoint
from xverse.train.copies import Copies
from xverse.train.float8 import check_float8
from xverse.train.keeping import locked
from xverse.train.materialise import Weights
from xverse.train.meter import Meter
from xverse.train.optimizer import learning_rate, make_optimizer
from xverse.train.parallel import ALONE, Replica, World, distribute, for_inference
from xverse.train.report import peak_of
from xverse.train.settings import NOT_IDENTITY, TrainConfig, layout_of
from xverse.train.survival import Interrupted, Steadiness, Watchdog, requests
from xverse.train.trackers import Trackers

BatchAt = Callable[[int, int], Batch]


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What a run calls besides training: ``validate`` and, on benchmarks, ``evaluate`` return named figures
    at the steps of ``validate_every`` (the latter calls the function it gets whenever it has advanced);
    ``data_problem`` returns why the data is no longer usable, or an empty string, at the start and before
    each checkpoint; ``describe`` writes config and tokenizer into a checkpoint's folder."""

    validate: Callable[[Replica], dict[str, float]] | None = None
    evaluate: Callable[[XverseForCausalLM, Callable[[], None]], dict[str, float]] | None = None
    data_problem: Callable[[], str] | None = None
    describe: Callable[[Path], None] | None = None


def fit(
    model: XverseForCausalLM,
    batch_at: BatchAt,
    config: TrainConfig,
    out: Path | str,
    *,
    hooks: Hooks = Hooks(),  # frozen
    identity: Mapping[str, Any] | None = None,
    world: World = ALONE,
    weights: Weights | None = None,
    resume_from: Path | None = None,
) -> None:
    """Train ``model`` (float32 parameters, in place) for ``config.steps`` steps, resuming from ``out``. A
    model on the meta device takes this process's parts of ``weights``, which yields whole parameters.

    ``batch_at(first, stop)`` returns these sequences of the run; nothing else decides the order of data.
    Every figure is recorded in ``out/metrics.jsonl``. ``identity`` holds what else decides the losses.
    ``resume_from``: the run or checkpoint that a new run branches from. Where ``out`` is a URL, the run's
    folder is in the cache, and its checkpoints are sent to the URL and found there (``copies.py``).
    Raises UserError where ``out`` holds a run begun with other values, and where the run diverges. SIGINT and
    SIGTERM save a checkpoint and raise Interrupted. Every process of ``world`` calls this with equal weights.
    """
    layout_of(config, world.size, model.config)  # before anything is written
    check_float8(config, model.config, world.device)
    settings = dataclasses.asdict(config)
    identity = {**(identity or {}), **{key: settings[key] for key in settings if key not in NOT_IDENTITY}}
    identity = json.loads(json.dumps(identity))  # the types that reading it back gives
    began = time.perf_counter()
    place = Place.of(out)
    out = place.local
    copies = Copies(place, kept(out, config.kept_forever), config.keep_checkpoints)
    with locked(out, world), Watchdog(out, world, config.hang_seconds) as watchdog:
        if world.device.type == "cpu":
            keep_freed_memory()
        _check_data(hooks.data_problem, world)
        copies.bring(world)
        checked = None
        if config.preflight != "off":
            checked = preflight.check(world, config.preflight, config.preflight_share, config.dtype)
        started = time.perf_counter()
        checkpoint = find_checkpoint(out, world, identity, config, resume_from)
        search_seconds = time.perf_counter() - started
        if checkpoint and weights is not None:
            weights = ()  # the checkpoint has them all
        replica = distribute(model, config, world, weights)
        optimizer = make_optimizer(model, config)
        steadiness = Steadiness(config)
        first_step, resume_seconds = 0, 0.0
        if checkpoint:
            resume_seconds = _resume(checkpoint, search_seconds, replica, optimizer, steadiness)
            first_step = int(checkpoint[1]["step"])
        if first_step == config.steps:
            world.say(f"{place}: this run is finished ({config.steps} steps)")
            return
        trackers = Trackers(config.trackers if world.rank == 0 else [], out, first_step, settings)
        run = Run(replica, optimizer, config, out, steadiness, watchdog, identity, hooks, trackers, copies)
        with contextlib.closing(trackers):
            start = {"preflight": checked, "resume_seconds": round(resume_seconds, 3)}
            if any(start.values()):
                run.record(step=first_step - 1, **{key: value for key, value in start.items() if value})
            matmul = min(reading["matmul"] for reading in checked["readings"]) if checked else None
            meter = Meter(
                config,
                first_step,
                model.config,
                devices=world.size,
                peak=peak_of(world.device, matmul, config.float8),
                began=began,
                quiet=world.rank > 0,
            )
            run.train(batch_at, first_step, meter)


@dataclasses.dataclass
class Run:
    """A run in progress."""

    replica: Replica
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    out: Path
    steadiness: Steadiness
    watchdog: Watchdog
    identity: Mapping[str, Any]
    hooks: Hooks
    trackers: Trackers
    copies: Copies

    def __post_init__(self) -> None:
        self.world, self.model = self.replica.world, self.replica.model
        self.log: JsonlLog | None = JsonlLog(self.out / "metrics.jsonl") if self.world.rank == 0 else None
        self.saver = Checkpointer(
            self.out,
            self.replica,
            self.config.keep_checkpoints,
            self.config.kept_forever,
            self.hooks.describe,
            self.copies,
        )

    def record(self, **values: Any) -> None:
        if self.log is not None:
            self.log.write(values)
            self.trackers.log(values)

    def train(self, batch_at: BatchAt, first_step: int, meter: Meter) -> None:
        config, world = self.config, self.world
        read = (batch_at(*self.sequences(step)) for step in range(first_step, config.steps))
        if world.device.type == "cuda":
            read = (batch.pinned() for batch in read)
        batches = prefetch(read)
        with requests() as requested, contextlib.closing(batches), meter:  # type: ignore[type-var]
            for step in range(first_step, config.steps):
                self.watchdog.beat(step, "data")
                waited = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - waited
                rate = learning_rate(step, config)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                writing = self.saver.writing()
                with self.watched(step, first_step) as communication:
                    self.watchdog.beat(step, "counting")
                    own_targets = int((batch.targets != IGNORE).sum()) if self.replica.leads else 0
                    (count,) = world.sum(own_targets)
                    self.watchdog.beat(step, "step")
                    loss, norm = train_step(self.replica, batch, config, count)
                    # Signals reach each process at a different moment; all act on them after the same step.
                    norm = norm if world.rank == 0 else 0.0
                    save = requested.save or self.saver.again
                    loss, norm, stopping, saving = world.sum(loss, norm, requested.stop, save)
                bad = self.steadiness.judge(loss, norm)
                if bad:
                    self.optimizer.zero_grad(set_to_none=True)
                    self.skip(step, bad)
                else:
                    self.optimizer.step()
                    self.optimizer.zero_grad(set_to_none=True)
                    length = batch.tokens.shape[1]
                    figures = meter.step(step, loss, config.rows(step) * length, length, waited)
                    values: dict[str, Any] = {"step": step, "loss": loss, "grad_norm": norm, "lr": rate}
                    values |= figures
                    if communication:
                        values["communication"] = self.shared(communication, figures["seconds"], meter)
                    if writing:
                        values["beside_checkpoint"] = 1
                    self.record(**values)
                done = step + 1
                last = done == config.steps
                if last or (config.validate_every and done % config.validate_every == 0 and not stopping):
                    self.watchdog.beat(step, "validation")
                    self.measure(step, meter)
                due = config.checkpoint_due(done)
                if last or stopping or saving or (due and not bad):
                    requested.save = False
                    self.watchdog.beat(step, "checkpoint")
                    path = self.save(done, must=bool(last or stopping))
                    if stopping and not last:
                        world.say(
                            f"stopped after step {done}; {path.name} is saved; run the same command to "
                            "continue from it"
                        )
                        raise Interrupted
                meter.forget_time()

    def sequences(self, step: int) -> tuple[int, int]:
        """First and last + 1 of the run's sequences that this process gets in a step."""
        before = self.config.sequences(step)
        start, stop = self.replica.rows(self.config.rows(step))
        return before + start, before + stop

    @contextlib.contextmanager
    def watched(self, step: int, first_step: int) -> Iterator[list[float]]:
        """Wraps a step. If it is one of the profiled steps, the list holds the exposed and the total seconds
        of communication afterwards. The first steps are not profiled: they include set-up."""
        every, seconds, since = self.config.communication_every, list[float](), step - first_step
        if self.world.size == 1 or not every or since == 0 or since % every != 2 % every:
            yield seconds
            return
        with watching(self.world.device) as read:
            yield seconds
        seconds += read()

    def shared(self, communication: list[float], seconds: float, meter: Meter) -> dict[str, float]:
        """The seconds of communication in a step, as means over the processes."""
        exposed, total = (value / self.world.size for value in self.world.sum(*communication))
        meter.exposed(exposed / seconds)
        return {"exposed_seconds": round(exposed, 5), "all_seconds": round(total, 5)}

    def skip(self, step: int, reason: str) -> None:
        """Skip a step; after ``rollback_after`` in a row, roll back to the weights of the last checkpoint.

        What follows is a function of the checkpoint alone, so a run that is killed and resumed skips the same
        steps. The run never uses the data between the checkpoint and here, as in PaLM (Chowdhery et al.,
        2022, section 5.1): the same data would lead to the same state.
        """
        steady = self.steadiness
        if steady.bad < self.config.rollback_after:
            self.record(step=step, skipped=reason)
            self.world.say(f"step {step + 1} is skipped: {reason}")
            return
        self.saver.wait()
        checkpoint = None
        if steady.rollbacks < self.config.max_rollbacks:
            checkpoint = kept(self.out).newest(self.world)
        if checkpoint is None:
            self.record(step=step, skipped=reason)
            raise UserError(
                f"step {step + 1}: {reason}: the run diverged; "
                "start again in another out with a lower learning_rate or more warmup_steps"
            )
        path, state = checkpoint
        rollbacks = steady.rollbacks + 1
        load_checkpoint(path, state, self.model, self.optimizer, self.world)
        steady.restore({**state.get("steadiness", {}), "bad": 0, "rollbacks": rollbacks})
        self.record(step=step, skipped=reason, rollback=state["step"])
        self.world.say(
            f"step {step + 1} is skipped: {reason}: {self.config.rollback_after} in a row; rolled back to "
            f"{path.name}, continuing with the data of step {step + 2}"
        )

    def save(self, done: int, must: bool) -> Path:
        """Start a checkpoint. With ``must`` wait for it, and raise UserError if it cannot be written even
        after older ones were deleted for it."""
        _check_data(self.hooks.data_problem, self.world)  # never keep what was learnt from changed data
        state = {"identity": self.identity, "steadiness": self.steadiness.state()}
        began = time.perf_counter()
        path = self.saver.save(done, self.model, self.optimizer, state, must)
        self.record(step=done - 1, checkpoint={"stall_seconds": round(time.perf_counter() - began, 4)})
        while must and (problem := self.saver.wait()):
            if not self.saver.again:
                raise UserError(problem)
            self.saver.save(done, self.model, self.optimizer, state, True)
        return path

    def measure(self, step: int, meter: Meter) -> None:
        """Validation and benchmarks with the weights after ``step``."""
        self.replica.progress = lambda: self.watchdog.beat(step, "validation")
        if self.hooks.validate:
            figures = self.hooks.validate(self.replica)
            self.replica.settle()
            if figures:
                self.record(step=step, valid=figures)
                text = " · ".join(f"{k} {v:.3f}" for k, v in list(figures.items())[:6])
                meter.say(f"step {step + 1}: {text}")
        if self.hooks.evaluate:
            model = for_inference(self.model, self.world)
            if self.world.rank == 0:
                accuracies = self.hooks.evaluate(model, self.replica.progress)
                del model
                self.record(step=step, evaluation=accuracies)
                text = " · ".join(f"{name} {100 * value:.1f} %" for name, value in accuracies.items())
                meter.say(f"step {step + 1}: {text}")
            self.world.wait(self.replica.progress)


def train_step(
    model: XverseForCausalLM | Replica, batch: Batch, config: TrainConfig, count: float | None = None
) -> tuple[float, float]:
    """Accumulate the gradients of this process's rows [B, T] and clip; returns (loss in nats, gradient norm).

    The loss is divided by ``count``, the number of targets in the global batch (default: in ``batch``), so
    neither micro-batches nor processes change anything but rounding. The loss is this process's part of the
    sum; the norm is that of the whole gradient.
    """
    replica = model if isinstance(model, Replica) else Replica(model)
    device = next(replica.model.parameters()).device
    micro = config.micro_batch_size or len(batch.tokens)
    if replica.pipeline is not None:  # it divides the rows itself
        micro = len(batch.tokens)
    count = max(1.0, count if count is not None else int((batch.targets != IGNORE).sum()))
    total = torch.zeros((), device=device)
    for start in range(0, len(batch.tokens), micro):
        part = slice(start, start + micro)
        rows = [x[part].to(device, non_blocking=True) for x in (batch.tokens, batch.targets)]
        # Documents are located on the CPU: reading their ends from a GPU would wait for it.
        rows.append(batch.document_ids[part])
        with computing(device, config.dtype):
            total += replica.backward(rows, count, config, last=start + micro >= len(batch.tokens))
    norm = replica.clip(config.grad_clip or math.inf)
    return total.item() / count, norm


def sum_loss(
    model: XverseForCausalLM | Replica, tokens: Tensor, targets: Tensor, document_ids: Tensor, dtype: str
) -> Tensor:
    """Sum of the token losses, float32 in nats, of packed documents [B, T], computed in ``dtype``."""
    replica = model if isinstance(model, Replica) else Replica(model)
    device = next(replica.model.parameters()).device
    with computing(device, dtype):
        return replica.loss(tokens.to(device), targets.to(device), document_ids)


def computing(device: torch.device, dtype: str) -> torch.autocast:
    """Autocast: matmuls in ``dtype``; parameters, norms and losses stay in float32."""
    if device.type == "cpu" and dtype == "bfloat16":
        use_fast_products()
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def _check_data(problem: Callable[[], str] | None, world: World) -> None:
    message = world.agreed(problem() if problem and world.rank == 0 else "")
    if message:
        raise UserError(message)


def _resume(
    checkpoint: tuple[Path, dict[str, Any]],
    search_seconds: float,
    replica: Replica,
    optimizer: torch.optim.Optimizer,
    steadiness: Steadiness,
) -> float:
    """Load a checkpoint, found and verified in ``search_seconds``; returns the seconds in all."""
    started = time.perf_counter()
    path, state = checkpoint
    load_checkpoint(path, state, replica.model, optimizer, replica.world)
    steadiness.restore(state.get("steadiness", {}))
    seconds = search_seconds + time.perf_counter() - started
    replica.world.say(f"resuming from {path} ({seconds:.1f} s)")
    return seconds
