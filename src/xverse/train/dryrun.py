"""``xverse pretrain RECIPE --dry-run``: check a cluster's recipe on one small machine before it is queued.

The processes are torch's "fake" backend: a world of the cluster's size in which this process is rank 0 and
collectives do nothing. The model is built without memory and sharded as in the run, and one micro-batch runs
forward and backward through it as shapes only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from xverse.config import UserError
from xverse.data.mixture import OTHERS, check_weights
from xverse.model import Packed, XverseConfig, XverseForCausalLM
from xverse.plan.cost import Prediction, Software, predict
from xverse.plan.devices import find_device
from xverse.plan.layout import Layout
from xverse.plan.report import text
from xverse.plan.search import Task
from xverse.train.float8 import check_float8
from xverse.train.parallel import World, distribute
from xverse.train.pretrain import PretrainRecipe, checked_feed, checked_shape
from xverse.train.settings import TrainConfig, layout_of

_SOURCE = re.compile(r"([a-z0-9]+_)?[a-z]{2,3}")  # the names that data/prepare/pipeline.py gives


@dataclass
class Findings:
    """The result of a dry run: one line for each check."""

    lines: list[str]
    seconds: float

    def __str__(self) -> str:
        return "\n".join([*self.lines, f"dry run: {self.seconds:.1f} s, nothing was written"])


def dry_run(recipe: PretrainRecipe) -> Findings:
    """Check a recipe for its ``cluster``: mesh, shapes, memory and data; with the planner's prediction.

    Raises UserError for whatever would stop the run, and if states and activations exceed the memory.
    """
    started = time.perf_counter()
    if recipe.cluster is None:
        raise UserError(
            "a dry run needs the cluster: add cluster: {device: a800, gpus: 1024} to the recipe, or append "
            "cluster.device=… cluster.gpus=…"
        )
    shape, name = checked_shape(recipe)
    gpus, config = recipe.cluster.gpus, recipe.train
    task = Task(shape, find_device(recipe.cluster.device), gpus, recipe.sequence_length, config.batch_size)
    layout = layout_of(config, gpus, shape, task.length, task.device.gpus_per_machine)
    check_float8(config, shape, length=recipe.sequence_length)
    software = Software(passes="compiled" if config.compile else "eager", optimizer=config.optimizer)
    prediction = predict(task.arch, layout, task.device, task.length, software=software)
    _check_memory(prediction, task)
    lines = [f"shape {name}: {shape.num_parameters():,} parameters", f"layout: {layout}"]
    lines += _data(recipe, shape, layout)
    lines += _model(shape, config, task, layout)
    tokens = config.sequences(config.steps) * task.length
    lines += ["", text(task, name, [prediction], tokens, heading="predicted for"), ""]
    return Findings(lines, time.perf_counter() - started)


@contextlib.contextmanager
def fake_world(size: int, rank: int = 0) -> Iterator[World]:
    """A world of ``size`` processes of which only this one exists; collectives return immediately."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _clear_sharding_prop_cache()  # it would reuse another rank's mesh
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield World(rank, size, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def _data(recipe: PretrainRecipe, shape: XverseConfig, layout: Layout) -> list[str]:
    """Check the data if it is on this machine, else only the mixture."""
    if not (Path(recipe.data) / "train").is_dir():
        mixture = recipe.mixture.read()
        if mixture.categories is not None or mixture.languages is not None:
            for what in ("categories", "languages"):
                shares = getattr(mixture, what) or {OTHERS: 1.0}
                check_weights(shares, list(shares), what, summing=True)
            return [f"data: {recipe.data} is not on this machine; only the mixture's shares were checked"]
        weights = dict(mixture.weights or {OTHERS: 1.0})
        check_weights(weights, list(weights))
        odd = [key for key in weights if key != OTHERS and not _SOURCE.fullmatch(key)]
        if odd:
            raise UserError(
                f"mixture: '{odd[0]}' does not name a source; sources are LANGUAGE or CATEGORY_LANGUAGE"
            )
        return [
            f"data: {recipe.data} is not on this machine; only the names and weights of the mixture's "
            f"{len(weights)} sources were checked"
        ]
    feed = checked_feed(recipe, shape)
    config = recipe.train
    share = config.batch_size // layout.data
    end = config.sequences(config.steps)
    last = feed.batch(end - share, end)
    assert last.tokens.shape == (share, recipe.sequence_length)
    assert int(last.tokens.max()) < shape.vocab_size
    source, most = max(feed.mixture.epochs(end).items(), key=lambda item: item[1])
    return [f"data: {feed.mixture}; the source read most often is {source}, {most:.1f} times"]


def _model(shape: XverseConfig, config: TrainConfig, task: Task, layout: Layout) -> list[str]:
    """Build and shard the model as rank 0 would, and run one micro-batch through it as shapes."""
    rows, length = layout.micro_batch, task.length // layout.context
    context = Packed(torch.zeros(rows, length, dtype=torch.int32))  # one document a row
    with fake_world(task.gpus) as world, contextlib.ExitStack() as stack:
        model = XverseForCausalLM.empty(shape)
        eager = dataclasses.replace(config, compile=False, float8=False)
        distribute(model, eager, world)
        held = sum(_local(parameter).numel() for parameter in model.parameters())
        lines = [
            f"mesh: {task.gpus:,} processes; rank 0 holds {held:,} of {shape.num_parameters():,} parameters, "
            f"{16 * held / 1e9:.2f} GB with gradients and AdamW's moments in float32"
        ]
        if layout.pipeline > 1:
            return [*lines, "shapes: pipelines are not run, only their divisions were checked"]
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model.to_empty(device="cpu")
        kept: dict[int, Tensor] = {}  # held, so that no storage address is reused

        def keep(tensor: Tensor) -> Tensor:
            if not (tensor.is_leaf and tensor.requires_grad):  # parameters
                local = _local(tensor)
                kept.setdefault(local.untyped_storage()._cdata, local)
            return tensor

        tokens = torch.zeros(rows, length, dtype=torch.int64)  # [B, T]
        half = torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16")
        with half, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(tokens, context)  # [B, T, V], without memory
        logits.sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient"
            assert _local(parameter.grad).shape == _local(parameter).shape, name
        ring = f", without the ring of {layout.context} parts" if layout.context > 1 else ""
        size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        return [
            *lines,
            f"shapes: {rows} × {length:,} tokens ran forward and backward; {size / 1e9:.1f} GB kept "
            f"(not compiled{ring})",
        ]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _check_memory(prediction: Prediction, task: Task) -> None:
    needed, available = prediction.memory.total, task.device.memory
    if needed > available:
        raise UserError(
            f"needs {needed / 1e9:.0f} GB, but {task.device.name} has {available / 1e9:.0f} GB; "
            "find a layout that fits with xverse plan"
        )
