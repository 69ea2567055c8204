"""Checkpoints of a run: float32 parameters and optimizer moments in safetensors, never a pickle.

``OUT/checkpoints/step-00001200/`` appears by one rename when it is complete; the newest is resumed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xverse.config import UserError
from xverse.files import atomic_directory

PREFIX = "step-"


def save_checkpoint(
    out: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write the state after ``step`` steps and drop all but the newest ``keep`` checkpoints.

    Raises UserError where it cannot be written; the checkpoints before it remain.
    """
    path = out / "checkpoints" / f"{PREFIX}{step:08d}"
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    moments = {
        f"{key}.{names[parameter]}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    try:
        with atomic_directory(path) as folder:
            _write(dict(model.named_parameters()), folder / "model.safetensors")
            _write(moments, folder / "optimizer.safetensors")
            (folder / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
        for old in checkpoints(out)[:-keep]:
            hidden = old.with_name(f".{old.name}.tmp")  # killed half-way, it must not look like a checkpoint
            old.replace(hidden)
            shutil.rmtree(hidden)
    except OSError as error:  # beyond those that atomic_directory names, such as an I/O error
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path


def checkpoints(out: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted((out / "checkpoints").glob(f"{PREFIX}*"))


def clear_leftovers(out: Path) -> None:
    """Remove what a killed run was writing or deleting. Only for a run that is alone in ``out``."""
    for left in (out / "checkpoints").glob(f".{PREFIX}*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def read_state(path: Path) -> dict[str, Any]:
    """The ``state.json`` of a checkpoint: "step" and "identity". Raises UserError where it is damaged."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state["step"], int) or not isinstance(state["identity"], dict):
            raise ValueError("state.json holds no step and identity")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    return state


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors into ``model`` and ``optimizer``.

    Raises UserError for a checkpoint that is damaged or of another shape.
    """
    parameters = dict(model.named_parameters())
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    try:
        tensors = load_file(path / "model.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        _check("model.safetensors", tensors, {name: p.shape for name, p in parameters.items()})
        for key in ("exp_avg", "exp_avg_sq"):
            _check(
                "optimizer.safetensors", moments, {f"{key}.{name}": p.shape for name, p in trained.items()}
            )
        _check("optimizer.safetensors", moments, {f"step.{name}": torch.Size() for name in trained})
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(path, error) from error
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    for name, parameter in trained.items():
        # Copies: the tensors that were read are a mapping of a file that this run will soon delete.
        optimizer.state[parameter] = {
            key: moments[f"{key}.{name}"].to(parameter.device, copy=True)
            for key in ("step", "exp_avg", "exp_avg_sq")
        }


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error  # as any other writing fails


def _check(file: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"{file} has no '{name}'")
        if tensors[name].shape != shape:
            raise ValueError(f"{file}: '{name}' is {list(tensors[name].shape)}, not {list(shape)}")


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"{path}: this checkpoint cannot be read ({reason}); delete it to resume before it")
