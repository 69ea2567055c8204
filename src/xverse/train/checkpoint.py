"""Checkpoints of a run: written by all processes at once, beside training, and verified when read.

``OUT/checkpoints/step-00001200/`` appears by one rename when it is complete. It holds safetensors, never
pickles, written by torch.distributed.checkpoint: each process writes the tensors that it holds, and any
number of processes can read them. ``state.json``, written last, has the size and SHA-256 of every file. All
processes must see the same ``OUT``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner, Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.tensor import DTensor

from xverse.config import UserError
from xverse.files import atomic_file
from xverse.log import notice
from xverse.train.index import Index, Part, read_header
from xverse.train.materialise import held
from xverse.train.parallel import ALONE, Replica, World

PREFIX = "step-"
READING = (OSError, ValueError, KeyError, TypeError, SafetensorError)

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process is intended


class Checkpointer:
    """Writes checkpoints in a thread, one at a time; training waits only while tensors are copied.

    The newest ``keep`` finished checkpoints are kept, and those whose step ``keep_every`` divides (0: none).
    A checkpoint that cannot be written causes a warning on stderr, and earlier ones are kept. ``replica``
    determines which of the processes that hold the same tensors writes them.
    """

    def __init__(self, out: Path, replica: Replica | None = None, keep: int = 2, keep_every: int = 0) -> None:
        self._out, self._keep, self._keep_every = out, keep, keep_every
        self._world = replica.world if replica else ALONE
        self._first = replica.first if replica else True
        self._thread: threading.Thread | None = None
        self._problem = ""

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
    ) -> Path:
        """Start writing the state after ``step`` steps, once the previous checkpoint is written; every
        process calls it."""
        self.wait()
        path = self._out / "checkpoints" / f"{PREFIX}{step:08d}"
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
        self._thread = threading.Thread(
            target=self._finish, args=(written.result, temporary, path, values), daemon=True
        )  # a daemon, so that this process can exit if another has died
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

    def _finish(self, written: Callable[[], Any], temporary: Path, path: Path, state: dict[str, Any]) -> None:
        """In every process, after it has written its files; process 0 publishes the checkpoint."""
        problem, files = "", {}
        try:
            written()
            for file in sorted(temporary.glob(f"shard-{self._world.rank + 1:05d}-*")):
                files[file.name] = _fingerprint(file)
        except (Exception, dcp.api.CheckpointException) as error:  # not a subclass of Exception
            problem = _reason(error)
        results = [(problem, files)]
        if self._world.size > 1:
            results = [("", {})] * self._world.size
            dist.all_gather_object(results, (problem, files), group=self._world.saving)
        problem = next((text for text, _ in results if text), "")
        if self._world.rank == 0:
            try:
                if not problem:
                    together = {name: mark for _, digests in results for name, mark in digests.items()}
                    self._publish(temporary, path, {**state, "files": together})
            except (OSError, UserError) as error:
                problem = _reason(error)
            if problem:
                shutil.rmtree(temporary, ignore_errors=True)
                notice(f"WARNING: {path.name} was not saved ({problem}); training continues, older ones stay")
        box = [problem]
        if self._world.size > 1:
            dist.broadcast_object_list(box, src=0, group=self._world.saving)
        self._problem = f"{path}: {box[0]}; nothing was written" if box[0] else ""

    def _publish(self, temporary: Path, path: Path, state: dict[str, Any]) -> None:
        with atomic_file(temporary / "state.json") as file:
            file.write_text(json.dumps(state), encoding="utf-8")
        if path.exists():  # written before a rollback
            _remove(path)
        temporary.replace(path)
        _sync(path.parent)
        for old in checkpoints(self._out)[: -self._keep]:
            if not self._keep_every or _step(old) % self._keep_every:
                _remove(old)


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


def checkpoints(out: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted((out / "checkpoints").glob(f"{PREFIX}*"), key=_step)


def clear_leftovers(out: Path) -> None:
    """Remove what a killed run was writing or deleting. Only for a run that holds the lock of ``out``."""
    for left in (out / "checkpoints").glob(f".{PREFIX}*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def newest(out: Path, world: World = ALONE) -> tuple[Path, dict[str, Any]] | None:
    """The newest intact checkpoint and its state, or None. Every process calls it and verifies its share of
    the files.

    Damaged checkpoints are reported and renamed to ``damaged-step-…``. Raises UserError if all are damaged.
    """
    damaged: list[tuple[Path, str]] = []
    for path in world.agreed(checkpoints(out)[::-1] if world.rank == 0 else []):
        state, problem = _state(path, world)
        try:
            if not problem:
                _verify(path, state, world)
        except READING as error:
            problem = _reason(error)
        problem = world.first(problem)
        if problem:
            damaged.append((path, f"{path}: this checkpoint cannot be read ({problem})"))
            continue
        if world.rank == 0:
            for aside, text in damaged:
                notice(f"WARNING: {text}; going back to {path.name}")
                target = aside.with_name(f"damaged-{aside.name}")
                shutil.rmtree(target, ignore_errors=True)
                aside.replace(target)
        return path, state
    if damaged:
        raise UserError(f"{damaged[0][1]}, and no earlier one is intact; delete it to start again")
    return None


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
    files = sorted(state["files"])
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
        problem = _reason(error)
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


def _state(path: Path, world: World) -> tuple[dict[str, Any], str]:
    """``state.json``, in every process, or why it cannot be read."""
    state: dict[str, Any] = {}
    problem = ""
    if world.rank == 0:
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            if not isinstance(state["step"], int) or not isinstance(state["identity"], dict):
                raise ValueError("state.json has no step or identity")
            if not isinstance(state.get("files"), dict):
                raise ValueError("state.json does not list the files")
        except READING as error:
            problem = _reason(error)
    return world.agreed((state, problem))


def _verify(path: Path, state: dict[str, Any], world: World) -> None:
    """Compare this process's share of the files with their recorded sizes and digests. Raises one of
    READING."""
    for name in sorted(state["files"])[world.rank :: world.size]:
        size, digest = state["files"][name]
        if (path / name).stat().st_size != size:
            raise ValueError(f"{name} has {(path / name).stat().st_size} bytes, not {size}")
        if _fingerprint(path / name) != [size, digest]:
            raise ValueError(f"{name} has another SHA-256 than state.json records")


def _check(saved: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> None:
    for name, shape in expected.items():
        if name not in saved:
            raise ValueError(f"it has no '{name}'")
        if saved[name] != shape:
            raise ValueError(f"'{name}' is {list(saved[name])}, not {list(shape)}")


def _fingerprint(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _reason(error: BaseException) -> str:
    """A short description of an error; torch wraps the errors of all processes into one."""
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    text = " ".join(str(error).split())
    number = re.search(r"os error (\d+)", text)  # safetensors is Rust
    return os.strerror(int(number[1])) if number else text[:300] or type(error).__name__


def _step(path: Path) -> int:
    number = path.name.removeprefix(PREFIX)
    return int(number) if number.isdigit() else -1


def _remove(path: Path) -> None:
    hidden = path.with_name(f".{path.name}.old.tmp")  # must not look like a checkpoint after a kill
    path.replace(hidden)
    shutil.rmtree(hidden)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
