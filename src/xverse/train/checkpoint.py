"""Checkpoints of a run: written by all processes at once while training continues, and verified when read.

``OUT/checkpoints/step-00001200/`` appears by one rename when it is complete. It holds safetensors, never
pickles, written by torch.distributed.checkpoint: each process writes the tensors that it holds, and any
number of processes can read them. Config and tokenizer lie beside them, so every command can read it as a
model (``formats/checkpoint.py``). ``state.json``, written last, has the size and SHA-256 of every other file.
All processes must see the same ``OUT``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner, Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.tensor import DTensor

from xverse.config import UserError
from xverse.files import fingerprint, read_sealed, sealed, sync, write_text
from xverse.formats.parts import SHARD, Index, Part, read_header
from xverse.log import notice
from xverse.train.copies import Copies
from xverse.train.keeping import READING, Kept, State, is_full, reason
from xverse.train.materialise import held
from xverse.train.parallel import ALONE, Replica, World

PREFIX = "step-"

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process is intended


class Checkpointer:
    """Writes checkpoints in a thread, one at a time; training waits only while tensors are copied.

    The newest ``keep`` finished checkpoints are kept, and those whose step is kept ``forever``. One that
    cannot be written causes a warning on stderr; on a full disk, older ones are deleted for it
    (``Kept.make_room``). ``replica`` determines which of the processes that hold the same tensors writes
    them. ``describe`` writes the files that make a model directory of a checkpoint, except the weights.
    ``copies`` sends each one to the URL of the run; what cannot be sent causes a warning too.
    """

    def __init__(
        self,
        out: Path,
        replica: Replica | None = None,
        keep: int = 2,
        forever: Callable[[int], bool] = lambda step: False,
        describe: Callable[[Path], None] | None = None,
        copies: Copies | None = None,
    ) -> None:
        self._kept, self._keep, self._describe, self._copies = kept(out, forever), keep, describe, copies
        self._world = replica.world if replica else ALONE
        self._first = replica.first if replica else True
        self._thread: threading.Thread | None = None
        self._problem = ""
        self.again = False  # the last one was not saved, but there is room for it now

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        last: bool = False,
    ) -> Path:
        """Start writing the state after ``step`` steps, once the previous checkpoint is written; every
        process calls it. ``last``: the run ends with it."""
        self.wait()
        self.again = False
        path = self._kept.folder / f"{PREFIX}{step:08d}"
        temporary = path.with_name(f".{path.name}.tmp")
        if self._world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        self._world.wait()
        written: Any = dcp.async_save(
            dict(_tensors(model, optimizer)),
            storage_writer=_OwnFile(str(temporary), self._world.rank),
            planner=OwnPlan(self._first),
            no_dist=True,
        )
        values = {"step": step, "processes": self._world.size, **state}
        arguments = (written.result, temporary, path, values, last)
        # A daemon, so that this process can exit if another has died.
        self._thread = threading.Thread(target=self._finish, args=arguments, daemon=True)
        self._thread.start()
        return path

    def wait(self) -> str:
        """Wait until the checkpoint is written; returns why it could not be, or an empty string."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._problem

    def writing(self) -> bool:
        """Whether a checkpoint is being written now."""
        return self._thread is not None and self._thread.is_alive()

    def _finish(
        self, written: Callable[[], Any], temporary: Path, path: Path, state: State, last: bool
    ) -> None:
        """In every process, after it has written its files; process 0 publishes the checkpoint."""
        problem, files = "", {}
        try:
            written()
            for file in sorted(temporary.glob(f"{SHARD}{self._world.rank + 1:05d}-*")):
                files[file.name] = fingerprint(file)
        except (Exception, dcp.api.CheckpointException) as error:  # not a subclass of Exception
            problem = reason(error)
        results = [(problem, files)]
        if self._world.size > 1:
            results = [("", {})] * self._world.size
            dist.all_gather_object(results, (problem, files), group=self._world.saving)
        problem, again, unsent = next((text for text, _ in results if text), ""), False, ""
        if self._world.rank == 0:
            try:
                if not problem:
                    together = {name: mark for _, digests in results for name, mark in digests.items()}
                    self._publish(temporary, path, {**state, "files": together})
            except (OSError, UserError) as error:
                problem = reason(error)
            if problem:
                problem, again = self._not_saved(problem, temporary, path, last)
            elif self._copies is not None:
                unsent = self._copies.send(path, last)
        box = [problem, again, unsent]
        if self._world.size > 1:
            dist.broadcast_object_list(box, src=0, group=self._world.saving)
        self._problem = f"{path}: {box[0]}; nothing was written" if box[0] else str(box[2])
        self.again = bool(box[1])

    def _not_saved(self, problem: str, temporary: Path, path: Path, last: bool) -> tuple[str, bool]:
        """Clean up after a failure; returns the problem, and whether there is room for the checkpoint now."""
        shutil.rmtree(temporary, ignore_errors=True)
        again = False
        with contextlib.suppress(OSError):
            again = is_full(problem) and self._kept.make_room(last)
        then = "it is written again" if again else "training continues, older ones stay"
        notice(f"WARNING: {path.name} was not saved ({problem}); {then}")
        return problem, again

    def _publish(self, temporary: Path, path: Path, state: State) -> None:
        if self._describe is not None:
            self._describe(temporary)
            beside = sorted(file for file in temporary.iterdir() if not file.name.startswith(SHARD))
            state["files"] |= {file.name: fingerprint(file) for file in beside}
        write_text(temporary / "state.json", sealed(state))
        if path.exists():  # written before a rollback
            self._kept.remove(path)
        temporary.replace(path)
        sync(path.parent)
        for old in self._kept.all()[: -self._keep]:
            if not self._kept.forever(self._kept.step(old)):
                self._kept.remove(old)


class OwnPlan(DefaultSavePlanner):
    """Each process plans on its own what it writes. torch's planner makes process 0 gather all plans to find
    duplicates, which grows with the number of processes (benchmarks/scale.md)."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self._first = first

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = dataclasses.replace(plan, items=[item for item in plan.items if self._writes(item)])
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Nothing to add: the headers of the files list all tensors."""
        self.global_plan, self.metadata = all_plans, Metadata({})
        return all_plans, self.metadata

    def _writes(self, item: WriteItem) -> bool:
        """The first process that holds a part writes it. A plain tensor, such as an optimizer's step count,
        is written with its parameter."""
        name = item.index.fqn
        value = self.state_dict[name]
        if isinstance(value, DTensor):
            place = value.device_mesh.get_coordinate()
            assert place is not None
            assert item.tensor_data is not None
            copies = [n for n, how in zip(place, value.placements, strict=True) if how.is_replicate()]
            return not any(copies) and 0 not in item.tensor_data.chunk.sizes
        owner = self.state_dict.get(f"model.{name.split('.', 2)[-1]}")
        if isinstance(owner, DTensor):
            place = owner.device_mesh.get_coordinate()
            return place is not None and not any(place)
        return self._first


class _OwnFile(dcp.HuggingFaceStorageWriter):
    """Safetensors of one process, numbered by its rank."""

    def __init__(self, path: str, rank: int) -> None:
        super().__init__(path, save_distributed=True)
        self._rank = rank

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, storage_data={"shard_index": self._rank + 1}) for plan in plans]


def kept(out: Path, forever: Callable[[int], bool] = lambda step: False) -> Kept:
    """The checkpoints of a run."""
    return Kept(out / "checkpoints", PREFIX, _read_state, forever)


def load_checkpoint(
    path: Path,
    state: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World = ALONE,
) -> None:
    """Load the tensors of a verified checkpoint into ``model`` and ``optimizer``, sharded or not. Every
    process calls it and reads its own parts.

    Raises UserError, in all processes, if the checkpoint holds other tensors.
    """
    files = sorted(name for name in state["files"] if name.startswith(SHARD))
    headers: list[bytes] = []
    with _together(path, world):
        headers = [read_header(path / name) for name in files[world.rank :: world.size]]
    shares = world.gathered(headers)
    with _together(path, world):
        index = Index(files, [shares[i % world.size][i // world.size] for i in range(len(files))])
        _load(path, index, model, optimizer)


def _load(path: Path, index: Index, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = dict(model.named_parameters())
    saved = {name: index.shape(name) for name in index}
    _check(saved, {f"model.{name}": parameter.shape for name, parameter in parameters.items()})
    target: dict[str, Tensor] = {f"model.{name}": p.detach() for name, p in parameters.items()}
    values: dict[Tensor, dict[str, Tensor]] = {}
    for name, size in saved.items():
        kind, _, rest = name.partition(".")
        key, _, of = rest.partition(".")
        if kind == "optimizer" and of in parameters:
            parameter, dtype = parameters[of], index.dtype(name)
            if size == parameter.shape:
                value = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            else:
                value = torch.zeros(size, dtype=dtype, device=parameter.device)
            target[name] = values.setdefault(parameter, {})[key] = value
    reads: dict[str, list[tuple[str, Part, tuple[int, ...], Tensor]]] = {}
    for name, tensor in target.items():
        offset, local = held(tensor)
        for part in index.parts(name, offset, local.shape):
            reads.setdefault(part.file, []).append((name, part, offset, local))
    copied = dict.fromkeys(target, 0)
    for file, parts in reads.items():
        with safe_open(path / file, framework="pt") as opened:
            for name, part, offset, local in parts:
                copied[name] += _copy(opened, name, part, offset, local)
    for name, tensor in target.items():
        if copied[name] != held(tensor)[1].numel():
            raise ValueError(f"'{name}' is incomplete")
    optimizer.state.clear()
    optimizer.state.update(values)


def _copy(opened: Any, name: str, part: Part, offset: tuple[int, ...], local: Tensor) -> int:
    """Copy the overlap of ``part`` and ``local``, which starts at ``offset`` in the whole tensor; returns its
    number of values."""
    here, there = [], []
    for begin, size, first, count in zip(part.offset, part.shape, offset, local.shape, strict=True):
        start, stop = max(begin, first), min(begin + size, first + count)
        here.append(slice(start - first, stop - first))
        there.append(slice(start - begin, stop - begin))
    into = local[tuple(here)]
    into.copy_(opened.get_slice(name)[tuple(there)] if there else opened.get_tensor(name))
    return into.numel()


@contextlib.contextmanager
def _together(path: Path, world: World) -> Iterator[None]:
    """A failure inside in one process raises UserError in all."""
    problem = ""
    try:
        yield
    except READING as error:
        problem = reason(error)
    problem = world.first(problem)
    if problem:
        raise UserError(f"{path}: this checkpoint cannot be read ({problem})")


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    names: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters():
        names[parameter] = name
        yield f"model.{name}", parameter.detach()
    for trained, values in optimizer.state.items():
        for key, value in values.items():
            yield f"optimizer.{key}.{names[trained]}", value


def _read_state(path: Path) -> State:
    """``state.json``. Raises one of READING."""
    state: State = read_sealed(path / "state.json")
    if not isinstance(state["step"], int) or not isinstance(state["identity"], dict):
        raise ValueError("state.json has no step or identity")
    if not isinstance(state.get("files"), dict):
        raise ValueError("state.json does not list the files")
    return state


def _check(saved: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> None:
    for name, shape in expected.items():
        if name not in saved:
            raise ValueError(f"it has no '{name}'")
        if saved[name] != shape:
            raise ValueError(f"'{name}' is {list(saved[name])}, not {list(shape)}")
