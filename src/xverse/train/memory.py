"""The predicted memory of a training step, from what autograd keeps of one layer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xverse.config import UserError
from xverse.hardware import available_memory
from xverse.kernels.bfloat16 import conversion_bytes
from xverse.kernels.native import library
from xverse.model import AttentionContext, FullCausal, XverseConfig, XverseForCausalLM
from xverse.plan.layout import Architecture, Batch, problem, with_batch
from xverse.plan.memory import Work, training_memory
from xverse.train.blocks import context_maker, prepare_blocks, takes_kernels
from xverse.train.parallel import World
from xverse.train.settings import TrainConfig, layout_of


def predicted_memory(
    shape: XverseConfig, config: TrainConfig, length: int, processes: int = 1, device: str = "cpu"
) -> dict[str, int]:
    """Bytes that one process holds at its fullest moment, by kind, see ``training_memory``.

    Activations are not computed from a formula: one layer and two are run with tensors that have shapes and
    no memory, under the same settings, and what stays alive is counted; each row is taken to be one document.
    Raises UserError where the settings do not fit the number of ``processes`` (``layout_of``).
    """
    layout = layout_of(config, processes, shape, length)
    stage = dataclasses.replace(shape, num_hidden_layers=shape.num_hidden_layers // layout.pipeline)
    plain = dataclasses.replace(config, activation_checkpointing="none")
    rows, columns = layout.micro_batch, length // layout.context
    work = Work(
        kept=kept_bytes(stage, config, rows, columns, device)[0],
        layer=kept_bytes(shape, plain, rows, columns, device)[1],
        parallel=config.parallel,
        half=config.dtype == "bfloat16",
        muon=config.optimizer == "muon",
        moment_bytes=2 if config.optimizer_dtype == "bfloat16" else 4,
        device=device,
        kernels=config.dtype == "bfloat16" and takes_kernels(config) and library() is not None,
    )
    predicted = training_memory(Architecture.of(shape), layout, length, work)
    if work.half and device == "cpu" and (converted := conversion_bytes()):
        predicted["conversion"] = converted
    return predicted


def kept_bytes(
    shape: XverseConfig, config: TrainConfig, rows: int, length: int, device: str
) -> tuple[int, int]:
    """Bytes of activations and of weights in the compute dtype that are kept for the backward pass of
    ``rows`` × ``length`` tokens: for all layers, and for one."""
    names = ["dtype", "activation_checkpointing"]
    if config.parallel == "fsdp":
        names += ["parallel", "tensor"]
    chosen = tuple((name, getattr(config, name)) for name in names)
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
        # FSDP gathers bfloat16, so nothing is cast.
        if config.parallel == "fsdp" and config.dtype == "bfloat16":
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
    """Records the storages that operations under it allocate."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[Any, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        taken = {  # views share storages; parameters are not activations
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


def announce(world: World, shape: XverseConfig, config: TrainConfig, length: int) -> None:
    """Print the prediction of a run. Raises UserError, before anything is allocated, if it does not fit."""
    available = available_memory(world.device)
    predicted = check_memory(shape, config, length, world.size, world.device.type, available)
    parts = ", ".join(f"{kind} {size / 1e6:,.0f}" for kind, size in predicted.items())
    total = sum(predicted.values())
    world.say(
        f"memory of a process, predicted: {total / 1e6:,.0f} MB ({parts}); "
        f"{available / 1e6:,.0f} MB are available"
    )


def check_memory(
    shape: XverseConfig,
    config: TrainConfig,
    length: int,
    processes: int = 1,
    device: str = "cpu",
    available: int | None = None,
) -> dict[str, int]:
    """The prediction. Raises UserError, which names settings that fit, if it exceeds ``available`` bytes
    (None: unknown)."""
    predicted = predicted_memory(shape, config, length, processes, device)
    needed = sum(predicted.values())
    if available is None or needed <= available or not config.check_memory:
        return predicted
    fitting = next(_fitting(shape, config, length, processes, device, available), "")
    advice = f"it fits with {fitting}" if fitting else "no setting makes it fit: use a smaller shape"
    raise UserError(
        f"one process needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available; "
        f"{advice} (train.check_memory: false skips this check)"
    )


def _fitting(
    shape: XverseConfig, config: TrainConfig, length: int, processes: int, device: str, available: int
) -> Iterator[str]:
    """Settings that fit, the least costly first; each is combined with those before it."""
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
        changes = with_batch(layout, Batch(tried.batch_size, tried.micro_batch_size, tried.batch_ramp_start))
        if isinstance(changes, str) or problem(Architecture.of(shape), changes, length):
            continue
        changed |= step
        if sum(predicted_memory(shape, tried, length, processes, device).values()) <= available:
            yield " and ".join(f"{name}: {value}" for name, value in changed.items())
