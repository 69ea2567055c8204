"""Several processes, each with some rows of every step's batch: DDP, or FSDP2, which also shards the model.

torchrun starts the processes. Collectives of the loop's own (counts, losses, agreements) go over a gloo group
of their own, and so do those of checkpoints, which run in a thread beside the loop's.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from xverse import hardware
from xverse.config import UserError
from xverse.log import notice
from xverse.model import XverseForCausalLM
from xverse.train.rendezvous import fresh_store

Parallel = Literal["none", "ddp", "fsdp"]


@dataclass(frozen=True)
class World:
    """The processes of a run and this one's place among them. Its collectives are for small values."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    control: dist.ProcessGroup | None = None
    saving: dist.ProcessGroup | None = None

    def rows(self, batch_size: int) -> tuple[int, int]:
        """First and last + 1 of this process's rows of a batch."""
        share = batch_size // self.size
        return self.rank * share, (self.rank + 1) * share

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def agreed(self, value: Any) -> Any:
        """What process 0 has; any picklable value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gathered(self, value: Any) -> list[Any]:
        """What each process has, by rank; any picklable value."""
        if self.size == 1:
            return [value]
        box = [None] * self.size
        dist.all_gather_object(box, value, group=self.control)
        return box

    def say(self, text: str) -> None:
        """A notice, once for all processes."""
        if self.rank == 0:
            notice(text)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier(group=self.control)


ALONE = World()


@contextlib.contextmanager
def world_of(parallel: Parallel) -> Iterator[World]:
    """Join the processes that torchrun started; yields the place among them, and leaves at the end.

    Raises UserError where ``parallel`` and the number of processes do not go together.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if parallel == "none":
        if size > 1:
            raise UserError(
                f"parallel: none, but there are {size} processes; set train.parallel to ddp or fsdp"
            )
        yield World(device=hardware.compute_device())
        return
    if "RANK" not in os.environ:
        raise UserError(
            f"parallel: {parallel} needs torchrun: torchrun --nproc-per-node N -m xverse.cli pretrain …"
        )
    device = hardware.compute_device(int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # The watchdog ends a hung run long before; collectives must outlast a slow evaluation on process 0.
    patience = datetime.timedelta(hours=4)
    store, rank, size = fresh_store(patience)
    dist.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=size)
    yield World(
        dist.get_rank(),
        size,
        device,
        dist.new_group(backend="gloo", timeout=patience),
        dist.new_group(backend="gloo", timeout=patience),
    )
    dist.destroy_process_group()  # not after an error: it could wait for a process that has died


class _Loss(nn.Module):
    """DDP reduces the gradients of what ran inside its own forward pass."""

    def __init__(self, model: XverseForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Tensor:
        return self.model.loss(*inputs)


@dataclass
class Replica:
    """How this process computes losses and gradients: ``model`` itself (under FSDP its shards), behind DDP
    where there is one. Gradients are summed over processes, not averaged."""

    model: XverseForCausalLM
    world: World = ALONE
    ddp: DistributedDataParallel | None = None

    def backward(self, last: bool, scale: float, *inputs: Any) -> Tensor:
        """Add ``scale`` · the loss's gradients to what there is; returns the loss, unscaled and detached.
        Before the ``last`` micro-batch DDP keeps its gradients to itself."""
        with contextlib.nullcontext() if self.ddp is None or last else self.ddp.no_sync():
            loss = self.model.loss(*inputs) if self.ddp is None else self.ddp(*inputs)
            (loss * (scale * self.world.size)).backward()  # which both divide by when they add up
        return loss.detach()

    def settle(self) -> None:
        """After a forward pass without a backward pass: FSDP has left parts gathered."""
        if isinstance(self.model, FSDPModule):
            self.model.reshard()


def distribute(model: XverseForCausalLM, parallel: Parallel, dtype: str, world: World) -> Replica:
    """Put ``model`` (equal in all processes) on this process's device and share its work, in place.

    FSDP2 (``fully_shard``) shards layer by layer; with ``dtype`` bfloat16 the layers are gathered in it, and
    their gradients are summed in float32. ``parallel: ddp`` keeps everything in every process.
    """
    model.to(world.device)
    if parallel == "none":
        return Replica(model, world)
    if parallel == "ddp":
        ids = [world.device] if world.device.type == "cuda" else None
        return Replica(
            model, world, DistributedDataParallel(_Loss(model), device_ids=ids, gradient_as_bucket_view=True)
        )
    mesh = init_device_mesh(world.device.type, (world.size,))
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = half if dtype == "bfloat16" else MixedPrecisionPolicy()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")
    return Replica(model, world)


def whole(model: XverseForCausalLM) -> XverseForCausalLM:
    """``model``, or where it is sharded a copy on the CPU with all its tensors. Every process calls it."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return model
    with torch.device("meta"):
        copied = XverseForCausalLM(copy.deepcopy(model.config))
    tensors = {name: full(tensor.detach()).cpu() for name, tensor in model.state_dict().items()}
    copied.load_state_dict(tensors, assign=True)
    return copied


def full(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded. Every process calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A whole ``tensor`` on the device of ``reference``, sharded as that is."""
    if isinstance(reference, DTensor):
        moved = tensor.to(reference.device, copy=True)
        return distribute_tensor(moved, reference.device_mesh, reference.placements)
    return tensor.to(reference.device, copy=True)
