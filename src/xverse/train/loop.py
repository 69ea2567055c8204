"""The training loop: batches by step number, AdamW, checkpoints; a killed run goes on where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from xverse.config import UserError
from xverse.data.feed import Batch, prefetch
from xverse.log import JsonlLog, console, notice, progress
from xverse.model import IGNORE, Packed, XverseForCausalLM, linear_cross_entropy
from xverse.train.checkpoint import (
    checkpoints,
    clear_leftovers,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from xverse.train.optimizer import cosine_lr, make_adamw

Validate = Callable[[XverseForCausalLM], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. ``batch_size`` is in sequences per optimizer step; ``micro_batch_size`` of them go
    through the model at a time (0: all). ``grad_clip`` is the largest gradient norm (0: any).
    ``validate_every`` and ``checkpoint_every`` are in steps (0: only at the end)."""

    steps: int
    batch_size: int
    learning_rate: float
    micro_batch_size: int = 0
    warmup_steps: int = 100
    final_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    validate_every: int = 0
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    log_every: int = 20

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if name in ("beta1", "beta2"):
                if not 0 <= value < 1:
                    raise ValueError(f"{name} must be at least 0 and below 1, not {value}")
            elif name in ("steps", "batch_size", "learning_rate", "keep_checkpoints", "log_every"):
                if not 0 < value < math.inf:
                    raise ValueError(f"{name} must be positive, not {value}")
            elif name != "dtype" and not 0 <= value < math.inf:
                raise ValueError(f"{name} must not be negative, not {value}")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop and has saved a checkpoint."""


# What decides the losses: a run folder goes on only under the same values.
NOT_IDENTITY = {"checkpoint_every", "keep_checkpoints", "log_every", "validate_every"}


def fit(
    model: XverseForCausalLM,
    batch_at: Callable[[int], Batch],
    config: TrainConfig,
    out: Path,
    *,
    validate: Validate | None = None,
    evaluate: Validate | None = None,
    identity: Mapping[str, Any] | None = None,
) -> None:
    """Train ``model`` (float32 parameters, in place) for ``config.steps`` steps, resuming from ``out``.

    ``batch_at(step)`` gives the global batch of a step and nothing else decides the order of data.
    ``validate`` returns named figures, and so does ``evaluate``, of benchmarks, at the same steps. Everything
    is recorded in ``out/metrics.jsonl``. ``identity`` is what else decides the losses: raises UserError where
    ``out`` holds a run begun with other values. SIGINT and SIGTERM save a checkpoint and raise Interrupted.
    """
    settings = dataclasses.asdict(config)
    identity = {**(identity or {}), **{key: settings[key] for key in settings if key not in NOT_IDENTITY}}
    identity = json.loads(json.dumps(identity))  # as it will be read back
    optimizer = make_adamw(model, weight_decay=config.weight_decay, betas=(config.beta1, config.beta2))
    with _alone(out):
        first_step = _resume(out, model, optimizer, identity)
        if first_step == config.steps:
            notice(f"{out}: this run is finished ({config.steps} steps)")
            return
        _train(model, optimizer, batch_at, config, out, first_step, validate, evaluate, identity)


def _train(
    model: XverseForCausalLM,
    optimizer: torch.optim.Optimizer,
    batch_at: Callable[[int], Batch],
    config: TrainConfig,
    out: Path,
    first_step: int,
    validate: Validate | None,
    evaluate: Validate | None,
    identity: Mapping[str, Any],
) -> None:
    log = JsonlLog(out / "metrics.jsonl")
    meter = _Meter(config, first_step)
    batches = prefetch(batch_at(step) for step in range(first_step, config.steps))
    with _stop_requested() as stop, contextlib.closing(batches), contextlib.closing(log), meter:  # type: ignore[type-var]
        for step in range(first_step, config.steps):
            batch = next(batches)
            learning_rate = cosine_lr(
                step,
                peak=config.learning_rate,
                warmup_steps=config.warmup_steps,
                steps=config.steps,
                final_ratio=config.final_lr_ratio,
            )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            loss, grad_norm = train_step(model, batch, config)
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                raise UserError(
                    f"step {step + 1}: loss {loss}, gradient norm {grad_norm}: the run diverged; "
                    "begin again in another out with a lower learning_rate or more warmup_steps"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            record = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": learning_rate}
            log.write({**record, **meter.step(step, loss, batch.tokens.numel())})
            done = step + 1
            last = done == config.steps
            due = config.validate_every and done % config.validate_every == 0 and not stop()
            figures = validate(model) if validate and (last or due) else {}
            if figures:
                log.write({"step": step, "valid": figures})
                meter.say(
                    f"step {done}: " + " · ".join(f"{k} {v:.3f}" for k, v in _headline(figures).items())
                )
            if evaluate and (last or due):
                accuracies = evaluate(model)
                log.write({"step": step, "evaluation": accuracies})
                said = " · ".join(f"{name} {100 * value:.1f} %" for name, value in accuracies.items())
                meter.say(f"step {done}: {said}")
            if last or stop() or (config.checkpoint_every and done % config.checkpoint_every == 0):
                path = save_checkpoint(
                    out, done, model, optimizer, {"identity": identity}, config.keep_checkpoints
                )
                if stop() and not last:
                    notice(
                        f"stopped after step {done}; {path.name} is saved, the same command goes on from it"
                    )
                    raise Interrupted
            meter.forget_time()


def train_step(model: XverseForCausalLM, batch: Batch, config: TrainConfig) -> tuple[float, float]:
    """Accumulate the gradients of one global batch and clip them; returns (loss in nats, gradient norm).

    The loss is divided by the count of targets in the whole batch, so the split into micro-batches changes
    nothing but rounding.
    """
    micro = config.micro_batch_size or config.batch_size
    count = int((batch.targets != IGNORE).sum().clamp(min=1))
    total = 0.0
    for start in range(0, len(batch.tokens), micro):
        part = slice(start, start + micro)
        loss = sum_loss(
            model, batch.tokens[part], batch.targets[part], batch.document_ids[part], config.dtype
        )
        (loss / count).backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    return total / count, norm.item()


def sum_loss(
    model: XverseForCausalLM, tokens: Tensor, targets: Tensor, document_ids: Tensor, dtype: str
) -> Tensor:
    """Sum of the token losses in nats of packed documents [B, T], computed in ``dtype``."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        hidden = model.model(tokens, Packed(document_ids))  # [B, T, D]
        return linear_cross_entropy(
            hidden.flatten(0, 1), model.lm_head.weight, targets.flatten(), reduction="sum"
        )


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold a run's folder, making it: two processes in it would mix their records and checkpoints."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    with lock:  # the system lets go of it however the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another process is training in this folder") from None
        except OSError:  # a file system without locks
            pass
        yield


def _resume(
    out: Path, model: XverseForCausalLM, optimizer: torch.optim.Optimizer, identity: Mapping[str, Any]
) -> int:
    """Load the newest checkpoint, if there is one; returns the number of steps done."""
    clear_leftovers(out)
    saved = checkpoints(out)
    if not saved:
        return 0
    state = read_state(saved[-1])
    begun = state["identity"]
    # A key that the checkpoint does not have yet came with a later version of this code.
    found = _difference(begun, {key: value for key, value in identity.items() if key in begun})
    if found:
        raise UserError(f"{out}: this run was begun with {found}; set it back or change out")
    load_checkpoint(saved[-1], model, optimizer)
    notice(f"resuming from {saved[-1]}")
    return int(state["step"])


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> str:
    """The first key, with its path, that differs: ``mixture.zh = 0.5, not 0.4``; or an empty string."""
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found = _difference(old, new, f"{path}{key}.")
            if found:
                return found
        elif old != new:
            return f"{path}{key} = {old}, not {new}"
    return ""


def _headline(figures: Mapping[str, float], most: int = 6) -> dict[str, float]:
    return dict(list(figures.items())[:most])


@contextlib.contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """A question that turns true at the first SIGINT or SIGTERM; a second SIGINT interrupts at once."""
    asked: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Meter:
    """Speed, and what a person sees of it: a bar in a terminal, a line now and then elsewhere."""

    def __init__(self, config: TrainConfig, first_step: int) -> None:
        self._config, self._first = config, first_step
        self._bar = progress(disable=not console.is_terminal)
        self._task = self._bar.add_task("training", total=config.steps, completed=first_step)
        self._start = self._last = time.perf_counter()
        self._spent = 0.0
        self._tokens = 0

    def __enter__(self) -> _Meter:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def forget_time(self) -> None:
        """Leave what happened since the last step (validation, a checkpoint) out of the speed."""
        self._last = time.perf_counter()

    def step(self, step: int, loss: float, tokens: int) -> dict[str, float]:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._spent += seconds
        self._tokens += tokens
        speed = self._tokens / self._spent
        text = f"loss {loss:.3f} · {speed:,.0f} tok/s"
        self._bar.update(self._task, completed=step + 1, description=text)
        done, steps = step + 1, self._config.steps
        if not console.is_terminal and (done % self._config.log_every == 0 or done == steps):
            left = (steps - done) * (now - self._start) / (done - self._first)
            notice(f"step {done}/{steps} · {text} · {left / 60:.1f} min left")
        return {"tokens_per_second": round(tokens / seconds, 1)}

    def say(self, text: str) -> None:
        console.print(text, markup=False)
