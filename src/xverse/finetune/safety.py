"""What keeps a fine-tuning run's work: its processes, signals, and checkpoints on a disk that may fill up.

The checkpoints are Trainer's; which of them are kept, verified and given up is ``train/keeping.py``'s, as in
pretraining.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from xverse import hardware
from xverse.config import UserError
from xverse.files import write_text
from xverse.log import notice
from xverse.place import MARKS
from xverse.train.copies import Copies
from xverse.train.keeping import fingerprints, is_full, reason
from xverse.train.parallel import ALONE, World
from xverse.train.survival import Requests

WRITING = (OSError, RuntimeError, SafetensorError, CheckpointException)  # torch.save raises RuntimeError


def world_of(args: TrainingArguments) -> World:
    """The processes of the run, with a gloo group for small values."""
    if args.world_size == 1:
        return ALONE
    return World(args.process_index, args.world_size, args.device, dist.new_group(backend="gloo"))


def _is_of_writing(error: BaseException) -> bool:
    """Whether the disk caused an error. RuntimeError may come from anywhere."""
    text = str(error)
    return (
        isinstance(error, OSError)
        or is_full(reason(error))
        or (isinstance(error, (SafetensorError, CheckpointException)) and "os error" in text)
    )


class Saver:
    """Writes Trainer's checkpoints, with the fingerprints of their files. One that cannot be written causes a
    warning; on a full disk older ones are deleted for it."""

    def __init__(self, copies: Copies, world: World) -> None:
        self._kept, self._copies, self._world = copies.kept, copies, world

    def save(self, step: int, write: Callable[[Path], None], last: bool) -> None:
        """Write ``checkpoint-STEP``; every process calls it. With ``last``, when the run ends with it, raises
        UserError if it cannot be written."""
        path = self._kept.folder / f"{self._kept.prefix}{step}"
        while True:
            problem = self._try(path, write)
            if not problem:
                unsent = self._copies.send(path, last) if self._world.rank == 0 else ""
                if unsent := self._world.agreed(unsent):
                    raise UserError(unsent)
                return
            again = False
            if self._world.rank == 0:
                shutil.rmtree(path, ignore_errors=True)
                again = is_full(problem) and self._kept.make_room(last)
                then = "it is written again" if again else "training continues, older ones stay"
                notice(f"WARNING: {path.name} was not saved ({problem}); {then}")
            if not self._world.agreed(again):
                break
        if last:
            raise UserError(f"{path}: {problem}; nothing was written")

    def finish(self, write: Callable[[], None]) -> None:
        """Write the finished model; on a full disk older checkpoints are deleted for it. Every process calls
        it. Raises UserError if it cannot be written."""
        out = self._kept.folder
        while problem := self._world.first(_problem(write)):
            again = False
            if self._world.rank == 0:
                for part in out.glob("*.safetensors"):  # what is there is incomplete
                    part.unlink()
                again = is_full(problem) and self._kept.make_room(last=False)
            if not self._world.agreed(again):
                raise UserError(
                    f"{out}: the model cannot be written ({problem}); make room and run the same command to "
                    "write it from the last checkpoint"
                )

    def _try(self, path: Path, write: Callable[[Path], None]) -> str:
        """Write a checkpoint; returns why it could not be written, or an empty string."""
        problem = self._world.first(_problem(lambda: write(path)))
        if problem:
            return problem
        marks: dict[str, list[Any]] = {}
        try:
            marks = fingerprints(path, self._world)
        except OSError as error:
            problem = reason(error)
        problem = self._world.first(problem)
        if not problem and self._world.rank == 0:
            try:
                write_text(path / MARKS, json.dumps({"files": marks}))
            except (OSError, UserError) as error:  # Trainer may have deleted the one before already
                notice(f"WARNING: {path.name} has no fingerprints ({reason(error)})")
        return problem


def _problem(write: Callable[[], None]) -> str:
    """Why the disk did not take what ``write`` writes, or an empty string."""
    try:
        write()
    except UserError as error:
        if not isinstance(error.__cause__, OSError):  # which files.py reports so
            raise
        return str(error)
    except WRITING as error:
        if not _is_of_writing(error):
            raise
        return reason(error)
    return ""


class ReturnMemory(TrainerCallback):
    """Gives freed memory back after a step in which the process held more than predicted. Rows have another
    length in every step, so blocks that are kept leave holes that later ones do not fit."""

    def __init__(self, predicted: int) -> None:
        self.most = predicted

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (hardware.process_memory("VmRSS") or 0) > self.most:
            hardware.trim_freed_memory()


class StopEarly(EarlyStoppingCallback):
    """transformers' early stopping, whose count of evaluations survives a restart."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        attributes = saved.get("attributes", {}) if isinstance(saved, dict) else {}
        self.early_stopping_patience_counter = attributes.get("early_stopping_patience_counter", 0)
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint after the step in which a signal arrived, and ends training if it asked for that."""

    def __init__(self, signals: Requests) -> None:
        self.signals = signals

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        save = self.signals.save
        if args.world_size > 1:  # processes receive a signal in different steps; agree on one
            flags = torch.tensor([self.signals.stop, save], dtype=torch.int32, device=args.device)
            torch.distributed.all_reduce(flags)
            self.signals.stop, save = (bool(flag) for flag in flags.tolist())
        self.signals.save = False
        control.should_save |= save or self.signals.stop
        control.should_training_stop |= self.signals.stop
