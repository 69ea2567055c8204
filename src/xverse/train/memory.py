"""How much memory a step takes, before it is taken, and how much it took."""

from __future__ import annotations

import dataclasses
import functools
import os
import resource
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xverse import hardware
from xverse.config import UserError
from xverse.model import AttentionContext, FullCausal, XverseConfig, XverseForCausalLM
from xverse.train.blocks import context_maker, prepare_blocks
from xverse.train.parallel import World
from xverse.train.settings import TrainConfig

LOGITS_CHUNK = 32 * 2**20  # float32 logits that the fused head holds at a time


def predicted_memory(
    shape: XverseConfig, config: TrainConfig, length: int, processes: int = 1, device: str = "cpu"
) -> dict[str, int]:
    """Bytes that one process holds at its fullest moment, by kind, without what libraries take.

    Three moments may be the fullest: the head's backward pass, when all activations are kept; the first
    layer's, when nearly all gradients are there; and the optimizer's step. Activations are not computed from
    a formula: one layer and two are run with tensors that have shapes and no memory, under the same settings,
    and what stays alive is counted; rows are taken to be of one document. A layer's backward pass holds two
    and a half times what it keeps, and a twentieth of all, on a CPU, is what glibc holds of freed blocks that
    do not fit again ("allocator"): these two are fitted to measurements.
    """
    parameters = shape.num_parameters()
    ends = shape.vocab_size * shape.hidden_size  # of the embedding, and of the head
    rows = config.micro_batch_size or max(1, config.batch_size // processes)
    accumulates = rows * processes < config.batch_size
    share = processes if config.parallel == "fsdp" else 1
    size = 2 if config.dtype == "bfloat16" else 4
    element = 2 if config.optimizer_dtype == "bfloat16" else 4
    moments = 2 * parameters - (parameters - 2 * ends if config.optimizer == "muon" else 0)
    held = 4 * parameters // share
    if config.parallel == "fsdp":  # the ends as long as the step lasts, and two layers under way
        layer = (parameters - 2 * ends) // shape.num_hidden_layers
        held += 4 * 2 * ends + 2 * size * layer
    fixed = {"parameters": held, "optimizer": element * moments // share}
    hidden = rows * length * shape.hidden_size
    there = 4 * parameters // share if accumulates or config.parallel == "ddp" else 0  # DDP's buckets
    head = {
        "gradients": 2 * 4 * ends + there,  # the head's is made in the forward pass, scaled in the backward
        "activations": kept_bytes(shape, config, rows, length, device)[0] + 2 * hidden * size,
        "logits": 2 * min(LOGITS_CHUNK, 4 * rows * length * shape.vocab_size)
        + (size * ends if size == 2 else 0),
    }
    plain = dataclasses.replace(config, activation_checkpointing="none")
    layer = kept_bytes(shape, plain, rows, length, device)[1]
    first = {"gradients": 4 * parameters // share, "activations": 5 * layer // 2, "logits": 0}
    last = {"gradients": 4 * parameters // share, "activations": 0, "logits": 0}
    fullest = max(head, first, last, key=lambda moment: sum((fixed | moment).values()))
    names = ("parameters", "gradients", "optimizer", "activations", "logits")
    predicted = {name: (fixed | fullest)[name] for name in names}
    if device == "cpu":
        predicted["allocator"] = sum(predicted.values()) // 20
    return predicted


def kept_bytes(
    shape: XverseConfig, config: TrainConfig, rows: int, length: int, device: str
) -> tuple[int, int]:
    """Bytes of activations, and of weights in the computing dtype, that are kept for the backward pass: of
    all layers, and of one."""
    chosen = (config.dtype, config.activation_checkpointing, device)
    one, two = (_kept(shape, chosen, rows, length, layers) for layers in (1, 2))
    return one + (shape.num_hidden_layers - 1) * (two - one), two - one


@functools.cache
def _kept(shape: XverseConfig, chosen: tuple[str, str, str], rows: int, length: int, layers: int) -> int:
    dtype, checkpointing, device = chosen
    config: Any = TrainConfig(
        steps=1,
        batch_size=1,
        learning_rate=1.0,
        activation_checkpointing=checkpointing,  # type: ignore[arg-type]
    )
    shape = dataclasses.replace(shape, num_hidden_layers=layers, vocab_size=256)
    context: AttentionContext = context_maker(False)(torch.zeros(rows, length, dtype=torch.int32))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        if device != "cpu":
            context = FullCausal(rows, length, device)
        with torch.device(device):
            model = XverseForCausalLM(shape)
        prepare_blocks(model, config)
        tokens = torch.zeros(rows, length, dtype=torch.int64, device=device)
        alive = _Alive()
        with alive, torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            hidden = model.model(tokens, context)
            kept = alive.bytes()
        del hidden
    return kept


class _Alive(TorchDispatchMode):
    """Which storages the operations under it have made."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[Any, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and id(leaf) not in before:
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                self._made.setdefault(reference.cdata, (reference, storage.nbytes()))
        return result

    def bytes(self) -> int:
        return sum(size for reference, size in self._made.values() if not reference.expired())


def available_memory(device: torch.device, sharing: int = 1) -> int | None:
    """Bytes that a process may take of its device, one of ``sharing`` on it; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = hardware.memory()[1]
    return None if available is None else available // sharing


def announce(world: World, shape: XverseConfig, config: TrainConfig, length: int) -> None:
    """Say what a run will take. Raises UserError, before anything is allocated, where it does not fit."""
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available = available_memory(world.device, sharing)
    predicted = check_memory(shape, config, length, world.size, world.device.type, available)
    parts = ", ".join(f"{kind} {size / 1e6:,.0f}" for kind, size in predicted.items())
    free = "" if available is None else f"; {available / 1e6:,.0f} MB are available"
    world.say(f"memory of a process, predicted: {sum(predicted.values()) / 1e6:,.0f} MB ({parts}){free}")


def check_memory(
    shape: XverseConfig,
    config: TrainConfig,
    length: int,
    processes: int = 1,
    device: str = "cpu",
    available: int | None = None,
) -> dict[str, int]:
    """The prediction; raises UserError that names settings which would fit where it is above ``available``
    bytes (None: nobody knows)."""
    predicted = predicted_memory(shape, config, length, processes, device)
    needed = sum(predicted.values())
    if available is None or needed <= available or not config.check_memory:
        return predicted
    found = next(_fitting(shape, config, length, processes, device, available), "")
    advice = f"it would fit with {found}" if found else "no setting here makes it fit: take a smaller shape"
    raise UserError(
        f"one process would take {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available; "
        f"{advice} (train.check_memory: false goes on all the same)"
    )


def _fitting(
    shape: XverseConfig, config: TrainConfig, length: int, processes: int, device: str, available: int
) -> Iterator[str]:
    """Settings that fit, the least costly first; each is tried with those before it."""
    changed: dict[str, Any] = {}
    steps: list[dict[str, Any]] = []
    rows = config.micro_batch_size or max(1, config.batch_size // processes)
    while rows > 1:
        rows = next(n for n in range(rows // 2, 0, -1) if config.batch_size % (n * processes) == 0)
        steps.append({"micro_batch_size": rows})
    if config.activation_checkpointing != "full":
        steps.insert(min(1, len(steps)), {"activation_checkpointing": "full"})
    if config.optimizer_dtype != "bfloat16":
        steps.append({"optimizer_dtype": "bfloat16"})
    if processes > 1 and config.parallel == "ddp":
        steps.append({"parallel": "fsdp"})
    for step in steps:
        changed |= step
        tried = dataclasses.replace(config, **changed)
        if sum(predicted_memory(shape, tried, length, processes, device).values()) <= available:
            yield " and ".join(f"{name}: {value}" for name, value in changed.items())


def measured_memory(device: torch.device | None = None) -> tuple[str, int]:
    """What was measured, and its most so far in bytes: of the GPU, or of the whole process."""
    if device is not None and device.type == "cuda":
        return "most allocated on the GPU", torch.cuda.max_memory_allocated(device)
    return "peak resident memory of the process, libraries included", peak_resident()


def peak_resident() -> int:
    """Bytes. Not getrusage on Linux: its peak starts with the parent's, from before exec."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123 - no path of a file's
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
