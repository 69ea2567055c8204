"""The search for the fastest layout that the trainer can run and that fits into memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from xverse.config import UserError, check_keys
from xverse.model.config import XverseConfig
from xverse.plan.cost import Prediction, Software, predict
from xverse.plan.devices import Device
from xverse.plan.layout import Architecture, Checkpointing, Layout, divisors, problem
from xverse.plan.memory import memory

BATCH_TOKENS = 4 * 2**20  # as Llama 2; more if needed for one sequence per GPU
ROOM = 0.92  # share of a device's memory that a plan may fill
TOKENS = 1 << 18  # of a micro-batch of more than 32 rows, at most
# Each kind of parallelism besides FSDP and HSDP must save more than this share of a step, and each doubling
# of the group that shares weights, beyond one machine, a quarter of it.
PLAIN = 0.004


@dataclass(frozen=True)
class Task:
    """What to train, and on which devices."""

    shape: XverseConfig
    device: Device
    gpus: int
    length: int
    sequences: int

    @property
    def arch(self) -> Architecture:
        return Architecture.of(self.shape)

    @property
    def batch_tokens(self) -> int:
        return self.sequences * self.length


def task_of(
    shape: XverseConfig, name: str, device: Device, gpus: int, length: int | None, batch_tokens: int | None
) -> Task:
    """A task with defaults: the shape's whole context, and a batch that divides among the GPUs.

    Raises UserError for a sequence longer than the context and for a batch that is not a whole number of
    sequences.
    """
    length = length or shape.context_length
    if length > shape.context_length:
        positions = shape.context_length
        raise UserError(
            f"a sequence of {length:,} tokens exceeds the {positions:,} positions of shape {name}"
        )
    if batch_tokens is None:
        sequences = gpus * max(1, round(BATCH_TOKENS / length / gpus))
    elif batch_tokens % length:
        near = max(1, round(batch_tokens / length)) * length
        raise UserError(
            f"a batch of {batch_tokens:,} tokens is not a whole number of sequences of {length:,}; "
            f"the nearest is {near:,}"
        )
    else:
        sequences = batch_tokens // length
    return Task(shape, device, gpus, length, sequences)


def software_of(layout: Layout, optimizer: Literal["adamw", "muon"] = "adamw") -> Software:
    """This trainer's: layers are compiled where possible."""
    return Software(passes="compiled" if layout.compiles else "eager", optimizer=optimizer)


_DEGREES = ("data", "shard", "replicate", "tensor", "context", "pipeline", "virtual_stages", "micro_batch")


def given_layout(task: Task, text: str) -> Layout:
    """The layout of ``data=64,tensor=8,zero=1``: degrees, the ZeRO stage (3: FSDP over ``data``),
    ``micro_batch`` and ``checkpointing``.

    Raises UserError for unknown keys, all of them, and for what does not divide.
    """
    values: dict[str, Any] = {}
    for word in text.split(","):
        key, separator, value = (part.strip() for part in word.partition("="))
        if not separator:
            raise UserError(f"--layout: expected key=value, found '{word}'")
        if key in values:
            raise UserError(f"--layout: {key} is given twice")
        values[key] = value
    check_keys(values, (*_DEGREES, "zero", "checkpointing"), "--layout")
    checkpointing = values.pop("checkpointing", "none")
    if checkpointing not in _CHECKPOINTING:
        raise UserError(
            f"--layout: checkpointing '{checkpointing}' is not one of {', '.join(_CHECKPOINTING)}"
        )
    for key, value in values.items():
        if not value.isdecimal() or (int(value) < 1 and key != "zero"):
            raise UserError(f"--layout: {key}={value}: expected a positive integer")
    numbers = {key: int(value) for key, value in values.items()}
    zero = numbers.pop("zero", 3)
    if zero not in (0, 1, 3):
        raise UserError(f"--layout: zero={zero}: 0 (DDP), 1 (optimizer states) and 3 (FSDP) are supported")
    others = math.prod(numbers.get(key, 1) for key in ("tensor", "context", "pipeline"))
    if "data" in numbers and ("shard" in numbers or "replicate" in numbers):
        raise UserError("--layout: give data, or shard and replicate")
    data = numbers.pop("data", 0) or numbers.get("shard", 0) * numbers.get("replicate", 1)
    data = data or task.gpus // others
    if data * others != task.gpus:
        raise UserError(f"--layout: {data} × {others} = {data * others} GPUs, not the {task.gpus} of --gpus")
    shard = numbers.pop("shard", data // numbers.get("replicate", 1)) if zero == 3 else 1
    numbers["replicate"] = data // shard
    micro = numbers.get("micro_batch", 1)
    if task.sequences % (data * micro):
        raise UserError(
            f"--layout: {task.sequences} sequences do not divide by data {data} × micro_batch {micro}; "
            "set --batch-tokens"
        )
    layout = Layout(
        shard=shard,
        accumulate=task.sequences // data // micro,
        checkpointing=cast(Checkpointing, checkpointing),
        zero1=zero == 1,
        **numbers,
    )
    fault = problem(task.arch, layout, task.length, task.device.gpus_per_machine)
    if fault:
        raise UserError(f"--layout: {fault}")
    return layout


def search(task: Task, optimizer: Literal["adamw", "muon"] = "adamw") -> list[Prediction]:
    """All layouts that fit, fastest first; of about equally fast ones, that with fewer kinds of parallelism
    and smaller groups that share weights first.

    Raises UserError if none fits, with the numbers and the nearest number of GPUs that works.
    """
    predictions = [
        predict(task.arch, layout, task.device, task.length, software=software_of(layout, optimizer))
        for layout in _fitting(task)
    ]
    if not predictions:
        raise UserError(_why_not(task))
    return sorted(predictions, key=_cost)


def _cost(prediction: Prediction) -> float:
    layout = prediction.layout
    kinds = sum(degree > 1 for degree in (layout.tensor, layout.context, layout.pipeline))
    doublings = math.log2(max(1, layout.sharded_over * layout.tensor / 8))
    return prediction.step.seconds * (1 + PLAIN * (kinds + doublings / 4))


def distinct(predictions: list[Prediction], count: int) -> list[Prediction]:
    """The best of each kind of layout, at most ``count``."""
    best: dict[tuple[Any, ...], Prediction] = {}
    for prediction in predictions:
        layout = prediction.layout
        degrees = (layout.replicate, layout.tensor, layout.context, layout.pipeline)
        key = (*(degree > 1 for degree in degrees), layout.checkpointing)
        best.setdefault(key, prediction)
    return list(best.values())[:count]


def _fitting(task: Task) -> Iterator[Layout]:
    for layout in _layouts(task):
        if memory(task.arch, layout, task.length).total <= ROOM * task.device.memory:
            yield layout


def _layouts(task: Task) -> Iterator[Layout]:
    """All layouts that the trainer can run: the degrees divide the GPUs, the model and the batch."""
    arch, gpus = task.arch, task.gpus
    most = max(32, TOKENS // task.length)  # rows of a micro-batch
    for tensor, pipeline in itertools.product(divisors(gpus, task.device.gpus_per_machine), divisors(gpus)):
        if pipeline > arch.layers or gpus % (tensor * pipeline):
            continue
        for context in divisors(gpus // (tensor * pipeline), 64):
            data = gpus // (tensor * pipeline * context)
            if task.sequences % data:
                continue
            rows = task.sequences // data
            runs = [v for v in (1, 2, 4, 8) if v * pipeline <= arch.layers] if pipeline > 1 else [1]
            for micro, virtual in itertools.product(divisors(rows, most), runs):
                for shard in divisors(data):
                    for checkpointing in _CHECKPOINTING:
                        layout = Layout(
                            shard=shard,
                            replicate=data // shard,
                            tensor=tensor,
                            context=context,
                            pipeline=pipeline,
                            virtual_stages=virtual,
                            micro_batch=micro,
                            accumulate=rows // micro,
                            checkpointing=checkpointing,
                        )
                        if shard == 1 and tensor * context * pipeline > 1:
                            continue  # the trainer combines DDP with nothing else
                        if problem(arch, layout, task.length, task.device.gpus_per_machine):
                            break
                        yield layout


_CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "full")


def _why_not(task: Task) -> str:
    """Why no layout fits, and the nearest number of GPUs on which one does."""
    reason = (
        f"no layout of {task.gpus:,} × {task.device.name} takes {task.sequences:,} sequences of "
        f"{task.length:,} tokens a step"
    )
    least = min((memory(task.arch, layout, task.length).total for layout in _layouts(task)), default=math.inf)
    if math.isfinite(least):
        reason += f": the smallest needs {least / 1e9:,.0f} GB of {ROOM * task.device.memory / 1e9:,.0f} GB"
    else:
        reason += ": the batch does not divide among them"
    for gpus in _near(task):
        other = Task(task.shape, task.device, gpus, task.length, task.sequences)
        if next(_fitting(other), None) is not None:
            return f"{reason}; the nearest number of GPUs that works is {gpus:,}"
    return f"{reason}; use another batch size or a device with more memory"


def _near(task: Task) -> list[int]:
    """Numbers of GPUs that divide the batch and the model, those nearest to the task's first."""
    data = divisors(task.sequences, 16 * task.gpus)
    tensor = [n for n in divisors(task.device.gpus_per_machine) if task.arch.heads % n == 0]
    layers = divisors(task.arch.layers)
    numbers = {a * b * c * d for a in data for b in tensor for c in (1, 2, 4, 8, 16) for d in layers}
    return sorted(numbers, key=lambda number: (abs(number - task.gpus), number))
