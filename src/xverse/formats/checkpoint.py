"""Runs and their checkpoints as models, for every command that takes a model directory.

A run is the folder of ``xverse pretrain`` or ``xverse finetune``: its finished model, or the newest intact
checkpoint if that is newer. A checkpoint of pretraining holds the parts of the parameters that each process
had, under any layout, and one process puts them together; the optimizer's states are not read. A checkpoint
of fine-tuning is a model directory, or with FSDP holds torch.distributed.checkpoint's own files.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xverse.config import UserError
from xverse.files import check_fingerprint, read_sealed
from xverse.formats.directory import AssembledDirectory, ModelDirectory
from xverse.formats.parts import SHARD, Index, read_header
from xverse.formats.weights import TensorFiles, listed
from xverse.log import notice
from xverse.place import MARKS, STATE
from xverse.texts import read_object

if TYPE_CHECKING:
    import torch
    from torch import Tensor


FSDP = "pytorch_model_fsdp_0"  # accelerate's folder of a sharded model
MODEL = "model."  # begins the names of the parameters
_DAMAGED = (OSError, ValueError, KeyError, TypeError)
_ADAPTER = "adapter_config.json"


def model_at(path: Path, name: str | None = None) -> ModelDirectory | None:
    """The model of a run's or a checkpoint's folder; None for other folders, such as model directories.

    Raises UserError for a damaged checkpoint, a run without any that is intact, and an adapter.
    """
    if (path / STATE).is_file() and any(path.glob(f"{SHARD}*.safetensors")):
        check_files(path)
        return TrainingCheckpoint(path, name)
    if (path / "config.json").is_file():
        if (path / FSDP).is_dir() and not any(path.glob("*.safetensors")):
            check_files(path)
            return ShardedModel(path, name)
        if (path / MARKS).is_file():
            check_files(path)
        return None
    if (path / _ADAPTER).is_file():
        base = read_object(path / _ADAPTER).get("base_model_name_or_path") or "BASE"
        raise UserError(f"{path}: holds an adapter; give --model {base} --adapter {path}")
    return _model_of_run(path, name)


def _model_of_run(run: Path, name: str | None) -> ModelDirectory | None:
    run = run.parent if run.name == "checkpoints" else run
    checkpoints = [*run.glob("checkpoints/step-*")] or [*run.glob("checkpoint-*")]
    checkpoints = sorted((path for path in checkpoints if _step(path) >= 0), key=_step)
    finished = run / "model"
    if (finished / "config.json").is_file() and (
        not checkpoints or _finished_step(run) >= _step(checkpoints[-1])
    ):
        return ModelDirectory(finished, name)
    problems = []
    for path in reversed(checkpoints):
        try:
            model = model_at(path, name) or ModelDirectory(path, name)
            _ = model.values
        except UserError as error:
            if (path / _ADAPTER).is_file():
                raise
            problems.append(str(error))
            continue
        for problem in problems:
            notice(f"WARNING: {problem}")
        notice(f"{run}: using {path.relative_to(run)}")
        return model
    if problems:
        raise UserError(f"{problems[0]}, and no earlier one is intact")
    return None


def _step(path: Path) -> int:
    number = re.fullmatch(r"(?:step|checkpoint)-(\d+)", path.name)
    return int(number[1]) if number else -1


def _finished_step(run: Path) -> float:
    """The steps of the run's finished model, which ``recipe.json`` has; infinite if it is not recorded."""
    try:
        return int(read_sealed(run / "recipe.json")["train"]["steps"])
    except _DAMAGED:
        return float("inf")


def check_files(path: Path) -> None:
    """Compare the files of a checkpoint with their recorded sizes and digests; raises UserError for one that
    differs. One of fine-tuning by an earlier version has none."""
    try:
        if (path / STATE).is_file():
            marks = read_sealed(path / STATE)["files"]
        else:
            marks = read_sealed(path / MARKS)["files"] if (path / MARKS).is_file() else {}
        for name, mark in marks.items():
            check_fingerprint(path / name, mark)
    except _DAMAGED as error:
        lost = f"{Path(error.filename).name}: " if isinstance(error, FileNotFoundError) else ""
        why = f"{lost}{error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{path}: this checkpoint cannot be read ({why})") from None


class _Assembled(AssembledDirectory):
    @property
    def stored_dtype(self) -> torch.dtype:
        tensors: Any = self.tensors  # the subclasses' have a dtype
        dtype: torch.dtype = tensors.dtype
        return dtype


class TrainingCheckpoint(_Assembled):
    """A checkpoint of pretraining."""

    kind = "a training checkpoint"

    @cached_property
    def values(self) -> dict[str, Any]:
        if not (self.path / "config.json").is_file():
            raise UserError(
                f"{self}: has no config.json, because an earlier version wrote it; copy config.json and "
                "tokenizer.json of the run's model into it"
            )
        return super().values

    @cached_property
    def weight_files(self) -> list[Path]:
        return sorted(self.path.glob(f"{SHARD}*.safetensors"))

    @cached_property
    def tensors(self) -> PartTensors:  # type: ignore[override]  # the same interface
        return PartTensors(self.weight_files)


class PartTensors:
    """The parameters of a checkpoint by name, put together from their parts, as ``TensorFiles``."""

    def __init__(self, files: list[Path]) -> None:
        self._files = {file.name: TensorFiles([file]) for file in files}
        self._index = Index(list(self._files), [read_header(file) for file in files])
        self.names = [name.removeprefix(MODEL) for name in self._index if name.startswith(MODEL)]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    @property
    def dtype(self) -> torch.dtype:
        return self._index.dtype(MODEL + self.names[0])

    def get(self, name: str) -> Tensor:
        """One whole tensor; a mapped file if one process held it. Raises UserError if a part is missing."""
        import torch

        key = MODEL + name
        shape = self._index.shape(key)
        parts = self._index.parts(key, [0] * len(shape), shape)
        if len(parts) == 1 and parts[0].shape == tuple(shape):
            return self._files[parts[0].file].get(key)
        whole, filled = torch.empty(shape, dtype=self._index.dtype(key)), 0
        for part in parts:
            place = tuple(slice(at, at + size) for at, size in zip(part.offset, part.shape, strict=True))
            whole[place] = self._files[part.file].get(key)
            filled += whole[place].numel()
        if filled != whole.numel():
            raise UserError(f"{listed(self._files)}: '{name}' is incomplete")
        return whole


class ShardedModel(_Assembled):
    """A fine-tuning checkpoint under FSDP: its weights are files of torch.distributed.checkpoint."""

    kind = "an FSDP checkpoint"

    @cached_property
    def weight_files(self) -> list[Path]:
        return sorted((self.path / FSDP).glob("*.distcp"))

    @cached_property
    def tensors(self) -> DistributedTensors:  # type: ignore[override]  # the same interface
        return DistributedTensors(self.path / FSDP)


class DistributedTensors:
    """The tensors below ``model.`` in a folder of torch.distributed.checkpoint, one at a time."""

    def __init__(self, folder: Path) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self._folder = folder
        stored = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
        self._stored = {
            name.removeprefix(MODEL): entry
            for name, entry in stored.items()
            if name.startswith(MODEL) and isinstance(entry, TensorStorageMetadata)
        }
        self.names = list(self._stored)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self._stored.values())).properties.dtype

    def get(self, name: str) -> Tensor:
        import torch
        import torch.distributed.checkpoint as dcp

        entry = self._stored[name]
        whole = {MODEL + name: torch.empty(entry.size, dtype=entry.properties.dtype)}
        dcp.load(whole, storage_reader=dcp.FileSystemReader(str(self._folder)), no_dist=True)
        return whole[MODEL + name]
