"""Checkpoints of a run: float32 parameters and optimizer moments in safetensors, never a pickle.

``OUT/checkpoints/step-00001200/`` appears by one rename when it is complete; the newest is resumed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

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
    """Write the state after ``step`` steps and drop all but the newest ``keep`` checkpoints."""
    path = out / "checkpoints" / f"{PREFIX}{step:08d}"
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    moments = {
        f"{key}.{names[parameter]}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    with atomic_directory(path) as folder:
        save_file(dict(model.named_parameters()), folder / "model.safetensors")
        save_file(moments, folder / "optimizer.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
    for old in checkpoints(out)[:-keep]:
        shutil.rmtree(old)
    return path


def checkpoints(out: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted((out / "checkpoints").glob(f"{PREFIX}*"))


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint's tensors into ``model`` and ``optimizer``; returns its ``state.json``.

    Raises UserError for a checkpoint that is damaged or of another shape.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "model.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors[name])
                optimizer.state[parameter] = {
                    key: moments[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
                }
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: this checkpoint cannot be read ({reason}); delete it to resume before it"
        ) from error
    return state
