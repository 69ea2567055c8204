"""Several processes: DDP, or any mesh of pipeline, FSDP2, context and tensor parallelism, around the model.

torchrun starts the processes. The loop's own collectives (counts, losses, decisions) use a separate gloo
group, and so do those of checkpoints, which run in a separate thread.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from xverse import hardware
from xverse.config import UserError
from xverse.device import compute_device, report_unused_gpu
from xverse.log import notice
from xverse.model import XverseForCausalLM
from xverse.plan.layout import Layout
from xverse.train.blocks import context_maker, prepare_blocks
from xverse.train.context import Ring
from xverse.train.float8 import convert_layers
from xverse.train.materialise import Weights, materialise
from xverse.train.pipeline import Pipeline, Stage, keep_stages
from xverse.train.rendezvous import fresh_store
from xverse.train.settings import TrainConfig, layout_of
from xverse.train.tensor import shard_tensors

Parallel = Literal["none", "ddp", "fsdp"]


@dataclass(frozen=True)
class World:
    """The processes of a run and this process's rank. The collectives are for small values."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    control: dist.ProcessGroup | None = None
    saving: dist.ProcessGroup | None = None

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes, in float64, the same bits everywhere."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            add_up(total, self.rank, self.size, self.control or dist.group.WORLD)
        return total.tolist()

    def first(self, problem: str) -> str:
        """The non-empty ``problem`` of the lowest rank, in every process; an empty string if there is
        none."""
        (problems,) = self.sum(bool(problem))
        return next(text for text in self.gathered(problem) if text) if problems else ""

    def agreed(self, value: Any) -> Any:
        """Process 0's value, in every process; any picklable value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, by rank; any picklable value."""
        if self.size == 1:
            return [value]
        box = [None] * self.size
        dist.all_gather_object(box, value, group=self.control)
        return box

    def say(self, text: str) -> None:
        """Print a notice in process 0 only."""
        if self.rank == 0:
            notice(text)

    def wait(self, progress: Callable[[], None] | None = None) -> None:
        """A barrier. ``progress`` is called while this process waits for the others."""
        if self.size == 1:
            return
        arrived = dist.barrier(group=self.control, async_op=True)
        while progress is not None and not arrived.is_completed():
            progress()
            time.sleep(0.2)
        arrived.wait()


def add_up(total: Tensor, rank: int, size: int, group: Any) -> None:
    """Sum ``total`` over the processes of a group, in place, by recursive doubling (Thakur et al., 2005): in
    log2(size) rounds each process exchanges its sum with another.

    Not dist.all_reduce: gloo reduces small tensors in a ring of 2 · (size - 1) sequential messages, 2,046 at
    1,024 processes, three times a step (benchmarks/scale.md); and another order of summation would change
    recorded losses in their last bits.
    """
    doubled = 1 << (size.bit_length() - 1)  # the largest power of two; each rank beyond it has a proxy
    other = torch.empty_like(total)
    if rank >= doubled:
        group.send([total], rank - doubled, 0).wait()
        group.recv([total], rank - doubled, 0).wait()
        return
    if rank + doubled < size:
        group.recv([other], rank + doubled, 0).wait()
        total += other
    distance = 1
    while distance < doubled:
        sent = group.send([total], rank ^ distance, 0)
        group.recv([other], rank ^ distance, 0).wait()
        sent.wait()
        total += other  # a + b and b + a are the same bits
        distance *= 2
    if rank + doubled < size:
        group.send([total], rank + doubled, 0).wait()


ALONE = World()


@contextlib.contextmanager
def world_of(parallel: Parallel) -> Iterator[World]:
    """Join the processes that torchrun started; yields this process's ``World`` and leaves at the end.

    Raises UserError where ``parallel`` does not fit the number of processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if parallel == "none":
        if size > 1:
            raise UserError(
                f"parallel: none, but there are {size} processes; set train.parallel to ddp or fsdp"
            )
        device = compute_device()
        report_unused_gpu(device)
        yield World(device=device)
        return
    if "RANK" not in os.environ:
        raise UserError(
            f"parallel: {parallel} needs torchrun: torchrun --nproc-per-node N -m xverse.cli pretrain …"
        )
    device = compute_device(process=int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # The watchdog ends a hung run much earlier; collectives must outlast a slow evaluation on process 0.
    patience = datetime.timedelta(hours=4)
    store, rank, size = fresh_store(patience)
    dist.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=size)
    control, saving = (dist.new_group(backend="gloo", timeout=patience) for _ in range(2))
    yield World(dist.get_rank(), size, device, control, saving)
    dist.destroy_process_group()  # not after an error: it might wait for a dead process


class _Loss(nn.Module):
    """The loss as a module, since DDP reduces the gradients of what ran inside its own forward pass."""

    def __init__(self, model: XverseForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Tensor:
        return self.model.loss(*inputs)


def _nothing() -> None:
    pass


@dataclass
class Replica:
    """How this process computes losses and gradients: ``model`` (in a mesh this process's part), wrapped in
    DDP if ``ddp`` is set. Gradients are summed over processes, not averaged."""

    model: XverseForCausalLM
    world: World = ALONE
    ddp: DistributedDataParallel | None = None
    layout: Layout = Layout()  # noqa: RUF009
    ring: Ring | None = None
    pipeline: Pipeline | None = None
    progress: Callable[[], None] = _nothing  # called before each forward pass without gradients

    def rows(self, batch_size: int) -> tuple[int, int]:
        """First and last + 1 of this process's rows of a batch; other processes may share them."""
        share, place = batch_size // self.layout.data, self.layout.place(self.world.rank)[1]
        return place * share, (place + 1) * share

    @property
    def first(self) -> bool:
        """Whether this process is the first of those that hold the same layers."""
        return not any(self.layout.place(self.world.rank)[1:])

    @property
    def leads(self) -> bool:
        """Whether this process is the one that counts the targets of its rows."""
        pipeline, _, context, tensor = self.layout.place(self.world.rank)
        return pipeline == context == tensor == 0

    def backward(
        self, rows: Sequence[Tensor], count: float, config: TrainConfig, last: bool = True
    ) -> Tensor:
        """Accumulate the gradients of the rows' loss, divided by ``count``; returns this process's part of
        the loss, float32 [], detached. ``rows`` are tokens, targets and document ids, int [B, T] each: a
        whole batch in a pipeline, otherwise one micro-batch. DDP reduces gradients only after the
        ``last``."""
        tokens, targets, document_ids = rows
        layout = self.layout
        # DDP and FSDP divide by this when they reduce.
        scale = layout.data * layout.context / count
        reports = layout.place(self.world.rank)[3] == 0  # the loss is whole in each process of a tensor group
        if self.ring is not None:
            tokens, targets = self.ring.columns(tokens), self.ring.columns(targets)
        if self.pipeline is not None:
            micro = config.micro_batch_size or len(tokens)
            loss = self.pipeline.backward(
                tokens, targets, document_ids, micro=micro, scale=scale, z_loss=config.z_loss
            )
            return loss * reports
        context = context_maker(config.compile, self.ring, tokens.device)(document_ids)
        inputs = (tokens, targets, context, config.z_loss)
        with contextlib.nullcontext() if self.ddp is None or last else self.ddp.no_sync():
            loss = self.model.loss(*inputs) if self.ddp is None else self.ddp(*inputs)
            (loss * scale).backward()
        return loss.detach() * reports

    @torch.no_grad()
    def loss(self, tokens: Tensor, targets: Tensor, document_ids: Tensor) -> Tensor:
        """Sum of the token losses of int [B, T] rows, float32 [], in every process; all processes call it."""
        self.progress()
        if self.ring is not None:
            tokens, targets = self.ring.columns(tokens), self.ring.columns(targets)
        if self.pipeline is not None:
            total = self.pipeline.loss(tokens, targets, document_ids)
        else:
            total = self.model.loss(
                tokens, targets, context_maker(False, self.ring, tokens.device)(document_ids)
            )
        if self.ring is not None:
            dist.all_reduce(total, group=self.ring.group)
        return total

    def settle(self) -> None:
        """Free the parameters that FSDP leaves gathered after a forward pass without a backward pass."""
        if self.pipeline is not None:
            self.pipeline.settle()
        elif isinstance(self.model, FSDPModule):
            self.model.reshard()

    def clip(self, most: float) -> float:
        """Clip the gradient to norm ``most``; returns the norm before, in every process."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if self.layout.processes == 1 or self.ddp is not None:
            return torch.nn.utils.clip_grad_norm_(parameters, most).item()
        gradients, copies = [], []
        for parameter in parameters:
            gradient: Any = parameter.grad
            copies.append(self.world.size // self.layout.pipeline // parts(parameter))
            if isinstance(parameter, DTensor):
                assert isinstance(gradient, DTensor)
                # Those of norm weights are partial sums over this process's tokens.
                if gradient.placements != parameter.placements:
                    gradient = gradient.redistribute(placements=parameter.placements)
                    parameter.grad = gradient
                gradient = gradient.to_local()
            gradients.append(gradient)
        norms = torch.stack(list(torch._foreach_norm(gradients))).double().cpu()
        (total,) = self.world.sum((norms**2 / torch.tensor(copies)).sum().item())
        norm = math.sqrt(total)
        if norm + 1e-6 > most:
            torch._foreach_mul_(gradients, most / (norm + 1e-6))
        return norm


def parts(tensor: Tensor) -> int:
    """Into how many distinct parts a tensor is sharded."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = [tensor.device_mesh.size(i) for i, p in enumerate(tensor.placements) if not p.is_replicate()]
    return math.prod(sizes)


def distribute(
    model: XverseForCausalLM, config: TrainConfig, world: World, weights: Weights | None = None
) -> Replica:
    """Move ``model`` (equal in all processes) to this process's device and parallelise it, in place.

    The order is: pipeline stages, tensor and sequence parallelism, FP8, activation checkpointing and
    compiling, FSDP2 (or DDP). A model on the meta device then gets this process's parts of ``weights``, so
    that no process holds the whole model; without weights it stays on meta. Raises UserError for a layout
    that does not fit the model or the processes.
    """
    _same_devices(world)
    layout = layout_of(config, world.size, model.config)
    if config.parallel != "fsdp":
        _fill(model, [model], weights, world)
        if config.float8:
            convert_layers(model, world.device)
        prepare_blocks(model, config)
        if config.parallel == "none":
            return Replica(model, world)
        ids = [world.device] if world.device.type == "cuda" else None
        ddp = DistributedDataParallel(_Loss(model), device_ids=ids, gradient_as_bucket_view=True)
        return Replica(model, world, ddp, layout)

    sharded = layout.shard * layout.context
    mesh = init_device_mesh(
        world.device.type,
        (layout.pipeline, layout.replicate, sharded, layout.tensor),
        mesh_dim_names=("pipeline", "replicate", "shard", "tensor"),
    )
    place = layout.place(world.rank)
    ring = _ring(layout, world)
    if layout.pipeline > 1:
        keep_stages(model, place[0], layout)
    if layout.tensor > 1:
        shard_tensors(model, mesh["tensor"])
    if config.float8:
        convert_layers(model, world.device)
    prepare_blocks(model, config)
    roots: Sequence[nn.Module] = [model]
    pipeline = None
    if layout.pipeline > 1:
        numbers = range(place[0], layout.stages, layout.pipeline)
        stages = [Stage(model, s, layout, context_maker(config.compile, ring, world.device)) for s in numbers]
        pipeline = Pipeline(stages, mesh["pipeline"].get_group(), layout, model.config.hidden_size)
        roots = stages
    if layout.replicate * sharded > 1:
        over = mesh["replicate", "shard"] if layout.replicate > 1 else mesh["shard"]
        _shard(model, roots, over, config.dtype)
    _fill(model, roots, weights, world)
    if pipeline is None:
        register_fsdp_forward_method(model, "loss")
    return Replica(model, world, None, layout, ring, pipeline)


def _fill(
    model: XverseForCausalLM, roots: Sequence[nn.Module], weights: Weights | None, world: World
) -> None:
    if weights is not None:
        materialise(model, roots, weights, world.device)
    elif not next(model.parameters()).is_meta:
        model.to(world.device)


def _shard(model: XverseForCausalLM, roots: Sequence[nn.Module], mesh: DeviceMesh, dtype: str) -> None:
    """FSDP2 layer by layer; each layer is gathered while the previous one computes. With ``dtype`` bfloat16
    layers are gathered in bfloat16 and gradients reduced in float32. A two-dimensional ``mesh`` is HSDP."""
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = half if dtype == "bfloat16" else MixedPrecisionPolicy()
    for root in roots:
        blocks = model.model.layers if root is model else root.layers
        layers = [fully_shard(layer, mesh=mesh, mp_policy=policy) for layer in blocks]  # type: ignore
        fully_shard(root, mesh=mesh)
        for layer, following in itertools.pairwise(layers):
            layer.set_modules_to_forward_prefetch([following])
            following.set_modules_to_backward_prefetch([layer])


def _ring(layout: Layout, world: World) -> Ring | None:
    if layout.context == 1:
        return None
    others = world.size // (layout.context * layout.tensor)
    shape = (others, layout.context, layout.tensor)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("others", "context", "tensor"))
    return Ring(mesh["context"].get_group(), layout.place(world.rank)[2], layout.context)


def _same_devices(world: World) -> None:
    """Raises UserError where processes compute on different kinds of devices: all would wait for the slowest,
    and they round differently."""
    cuda = world.device.type == "cuda"
    kinds = world.gathered(torch.cuda.get_device_name(world.device) if cuda else "a CPU")
    if problem := different_kinds(kinds):
        raise UserError(problem)


def different_kinds(kinds: Sequence[str]) -> str:
    """Why a run cannot use these devices (by rank), or an empty string."""
    if len(set(kinds)) < 2:
        return ""
    ranks = {
        kind: [rank for rank, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)
    }
    groups = [f"{len(some)} on {kind} (rank {some[0]}…)" for kind, some in ranks.items()]
    most = max(ranks, key=lambda kind: len(ranks[kind]))
    return (
        f"{len(kinds)} processes are on devices of different kinds: {', '.join(groups)}; "
        f"the nearest that works: the {len(ranks[most])} on {most} alone"
    )


def for_inference(model: XverseForCausalLM, world: World) -> XverseForCausalLM:
    """``whole``; on process 0's GPU, if there is one with enough free memory, as a copy in bfloat16."""
    if world.device.type != "cuda":
        return whole(model, world)
    if world.rank > 0:
        return whole(model, world, copied=True)
    torch.cuda.empty_cache()
    config = model.config
    cache = 4 * config.context_length * config.num_hidden_layers * config.kv_size * 2
    fits = 2 * config.num_parameters() + cache < 0.9 * hardware.available_memory(world.device)
    if not fits:
        world.say("too little free memory on the GPU for benchmarks; they run on the CPU")
    return whole(
        model, world, copied=True, device=world.device if fits else torch.device("cpu"), dtype=torch.bfloat16
    )


def whole(
    model: XverseForCausalLM,
    world: World = ALONE,
    *,
    copied: bool = False,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    dtype: torch.dtype | None = None,
) -> XverseForCausalLM:
    """``model`` itself if it is not sharded and need not be ``copied``, otherwise a copy with all tensors on
    the ``device`` of process 0, as ``dtype``, and on the meta device in the others. Every process calls
    it."""
    result = XverseForCausalLM.empty(copy.deepcopy(model.config))
    parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied head is in both
    sharded = parameters.keys() != result.state_dict().keys() or any(
        isinstance(p, DTensor) for p in parameters.values()
    )
    if not sharded and not copied:
        return model
    names = [set(some) for some in world.gathered(list(parameters))] if sharded else [set(parameters)]
    tensors = {}
    for name, empty in result.state_dict().items():
        tensor = full(parameters[name].detach()) if name in parameters else torch.empty(empty.shape)
        if not all(name in some for some in names):  # a pipeline
            owner = next(rank for rank, some in enumerate(names) if name in some)
            tensor = tensor.cpu().contiguous()
            dist.broadcast(tensor, owner, group=world.control)
        if world.rank == 0:
            tensors[name] = tensor.to(device, dtype or tensor.dtype)
    result.load_state_dict(tensors, assign=True, strict=world.rank == 0)
    result.tie()
    return result


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded. Every process calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
