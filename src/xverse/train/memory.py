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
from xverse.train.layout import layout_of, problem
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
    and what stays alive is counted; rows are taken to be of one document. Of a pipeline's processes the first
    counts, which holds the most micro-batches; FSDP keeps its weights and gradients whole until the last of
    them. A layer's backward pass holds two and a half times what it keeps; on a CPU a twentieth of all, and
    in float32 two layers' activations, is what glibc holds of freed blocks that do not fit again
    ("allocator"): these are fitted to measurements. The last differs by processor, a tenth of all in float32:
    the buffers of its matmuls lie between the blocks.

    Raises UserError where the settings do not go with the number of ``processes`` (``layout_of``).
    """
    layout = layout_of(config, processes, shape, length)
    mesh = config.parallel == "fsdp"
    share = layout.shard * layout.context if mesh else 1
    gathers = mesh and layout.replicate * share > 1
    pipeline, tensor = layout.pipeline, layout.tensor
    end = shape.vocab_size * shape.hidden_size // tensor  # the embedding, or the head
    layer = (shape.num_parameters() - 2 * tensor * end) // shape.num_hidden_layers // tensor
    layers, ends = shape.num_hidden_layers // pipeline, (2 if pipeline == 1 else 1) * end
    parameters = layers * layer + ends
    rows = config.micro_batch_size or config.batch_size // layout.data
    batches = config.batch_size // layout.data // rows
    length //= layout.context
    size = 2 if config.dtype == "bfloat16" else 4
    element = 2 if config.optimizer_dtype == "bfloat16" else 4
    moments = 2 * parameters - (layers * layer if config.optimizer == "muon" else 0)
    held = 4 * parameters // share
    if gathers:  # the ends as long as the step lasts, and two layers under way
        held += 4 * ends + size * layer * (2 if pipeline == 1 else layers)
    fixed = {"parameters": held, "optimizer": element * moments // share}
    hidden = rows * length * shape.hidden_size
    there = 0
    if batches > 1 or config.parallel == "ddp":  # DDP's buckets
        there = 4 * parameters // (share if pipeline == 1 else 1)
    here = dataclasses.replace(shape, num_hidden_layers=layers)
    activations = kept_bytes(here, config, rows, length, device)[0] // tensor
    runs = layout.virtual_stages  # interleaved 1F1B: so many runs of layers are forward before one is back
    under_way = min(batches * runs, (runs + 1) * pipeline - 1) if pipeline > 1 else runs
    head = {
        "gradients": 2 * 4 * end + there,  # the head's is made in the forward pass, scaled in the backward
        "activations": activations * under_way // runs + 2 * hidden * size,
        "logits": 2 * min(LOGITS_CHUNK, 4 * rows * length * shape.vocab_size // tensor)
        + (size * end if size == 2 else 0),
    }
    plain = dataclasses.replace(config, activation_checkpointing="none")
    one = kept_bytes(shape, plain, rows, length, device)[1] // tensor
    first = {"gradients": 4 * parameters // share, "activations": 5 * one // 2, "logits": 0}
    last = {"gradients": 4 * parameters // share, "activations": 0, "logits": 0}
    fullest = max(head, first, last, key=lambda moment: sum((fixed | moment).values()))
    names = ("parameters", "gradients", "optimizer", "activations", "logits")
    predicted = {name: (fixed | fullest)[name] for name in names}
    if device == "cpu":
        predicted["allocator"] = sum(predicted.values()) // 20 + (2 * one if size == 4 else 0)
    return predicted


def kept_bytes(
    shape: XverseConfig, config: TrainConfig, rows: int, length: int, device: str
) -> tuple[int, int]:
    """Bytes of activations, and of weights in the computing dtype, that are kept for the backward pass: of
    all layers, and of one."""
    kept: dict[str, Any] = {
        "dtype": config.dtype,
        "activation_checkpointing": config.activation_checkpointing,
    }
    if config.parallel == "fsdp":
        kept |= {"parallel": "fsdp", "tensor": config.tensor}
    chosen = tuple(kept.items())
    one, two = (_kept(shape, chosen, rows, length, layers, device) for layers in (1, 2))
    return one + (shape.num_hidden_layers - 1) * (two - one), two - one


@functools.cache
def _kept(
    shape: XverseConfig, chosen: tuple[tuple[str, Any], ...], rows: int, length: int, layers: int, device: str
) -> int:
    config = TrainConfig(steps=1, batch_size=1, learning_rate=1.0, **dict(chosen))
    shape = dataclasses.replace(shape, num_hidden_layers=layers, vocab_size=256)
    context: AttentionContext = context_maker(False)(torch.zeros(rows, length, dtype=torch.int32))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        if device != "cpu":
            context = FullCausal(rows, length, device)
        with torch.device(device):
            model = XverseForCausalLM(shape)
        if config.parallel == "fsdp" and config.dtype == "bfloat16":  # gathered in it, so never cast
            for module in model.model.layers.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, torch.nn.Parameter(parameter.to(torch.bfloat16)))
        prepare_blocks(model, config)
        tokens = torch.zeros(rows, length, dtype=torch.int64, device=device)
        alive = _Alive()
        with alive, torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
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
        taken = {  # views share them; parameters' are no activations
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in taken:
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
    layout = layout_of(config, processes, shape, length)
    rows = config.micro_batch_size or config.batch_size // layout.data
    while rows > 1:
        rows = next(n for n in range(rows // 2, 0, -1) if config.batch_size % (n * layout.data) == 0)
        steps.append({"micro_batch_size": rows})
    if config.activation_checkpointing != "full":
        steps.insert(min(1, len(steps)), {"activation_checkpointing": "full"})
    if config.optimizer_dtype != "bfloat16":
        steps.append({"optimizer_dtype": "bfloat16"})
    if processes > 1 and config.parallel == "ddp":
        steps.append({"parallel": "fsdp"})
    for step in steps:
        tried = dataclasses.replace(config, **changed | step)
        if problem(layout, tried, shape, length):
            continue
        changed |= step
        if sum(predicted_memory(shape, tried, length, processes, device).values()) <= available:
            yield " and ".join(f"{name}: {value}" for name, value in changed.items())


def measured_memory(device: torch.device | None = None) -> tuple[str, int]:
    """What was measured, and its most so far in bytes: of the GPU, or of the whole process."""
    if device is not None and device.type == "cuda":
        return "most allocated on the GPU", torch.cuda.max_memory_allocated(device)
    return "peak resident memory of the process, libraries included", peak_resident()


def peak_resident() -> int:
    """Bytes. Not getrusage on Linux: its peak starts with the parent's, from before exec."""
    unit = 1 if sys.platform == "darwin" else 1024
    return hardware.process_memory("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
