"""What identifies a run, and the checkpoint from which the same command continues it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xverse.config import UserError
from xverse.files import read_sealed, write_text
from xverse.finetune.encode import Data, Example, Prompt
from xverse.finetune.settings import Settings, read_settings, to_values
from xverse.formats.checkpoint import check_files
from xverse.log import notice
from xverse.place import MARKS
from xverse.texts import read_object
from xverse.train.keeping import LOCK, Kept
from xverse.train.parallel import World

STATE, TRAINER, PREFIX = "finetune.json", "trainer_state.json", "checkpoint-"
AUTOMATIC = (None, "true", "True")  # resume_from_checkpoint: from the last one
# Settings that may differ between a run and its continuation.
FREE = {
    "output_dir", "overwrite_output_dir", "overwrite_cache", "plot_loss", "resume_from_checkpoint",
    "preprocessing_num_workers", "padding_side", "local_rank", "do_eval", "report_to", "run_name",
    "disable_tqdm", "save_steps", "save_total_limit", "logging_steps", "logging_first_step", "dataset_dir",
    "dataloader_num_workers", "dataloader_pin_memory", "early_stopping_steps", "ddp_timeout", "save_dtype",
    "generation", "max_bad_share", "allow_code",
}  # fmt: skip


def run_state(settings: Settings, data: Data) -> dict[str, Any]:
    """What decides the losses of a run: its settings, and digests of its examples."""
    kept = {name: value for name, value in to_values(settings).items() if name not in FREE}
    return {"settings": kept, "train": _digest(data.train), "valid": _digest(data.valid)}


def begin_anew(settings: Settings) -> None:
    """Delete what an earlier run left that this one might continue from."""
    (settings.output_dir / STATE).unlink(missing_ok=True)
    (settings.output_dir / "metrics.jsonl").unlink(missing_ok=True)
    for path in checkpoints_of(settings.output_dir).all():
        shutil.rmtree(path)


def write_state(settings: Settings, state: dict[str, Any]) -> None:
    write_text(settings.output_dir / STATE, json.dumps(state, indent=1))


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(str((example.ids, example.mask)).encode())
        if isinstance(example, Prompt):
            digest.update(str(sorted(example.columns.items(), key=lambda item: item[0])).encode())
        if example.margin:
            digest.update(str(example.margin).encode())
    return digest.hexdigest()


def checkpoints_of(out: Path) -> Kept:
    """The checkpoints of a run."""
    return Kept(out, PREFIX, _read_state)


def is_finished(settings: Settings, state: dict[str, Any]) -> bool:
    """Whether ``output_dir`` holds the finished model of this very run. Raises UserError if its settings or
    data differ."""
    out, file = settings.output_dir, settings.output_dir / STATE
    if settings.overwrite_output_dir or settings.resume_from_checkpoint not in AUTOMATIC or not file.exists():
        return False
    if "finished" not in read_object(file) or not any(out.glob("*.safetensors*")):
        return False
    _compare(file, state)
    return True


def resume_point(settings: Settings, state: dict[str, Any], world: World) -> str | None:
    """The checkpoint to resume from, or None for a new run; every process calls it.

    Checkpoints that a killed run did not complete are deleted, damaged ones renamed. Raises UserError if the
    folder holds another run or other files, or if all checkpoints are damaged.
    """
    out = settings.output_dir
    if settings.resume_from_checkpoint not in AUTOMATIC:
        assert settings.resume_from_checkpoint is not None
        path = Path(settings.resume_from_checkpoint)
        if not path.is_dir():
            raise UserError(f"resume_from_checkpoint: no such folder: {settings.resume_from_checkpoint}")
        if not (path / TRAINER).is_file():
            raise UserError(f"resume_from_checkpoint: {path}: not a checkpoint of fine-tuning: no {TRAINER}")
        check_files(path)
        return settings.resume_from_checkpoint
    if world.rank == 0:
        clear_unfinished(out)
    kept, file = checkpoints_of(out), out / STATE
    found = world.agreed(kept.all() if world.rank == 0 else [])
    others = world.agreed([item.name for item in out.iterdir() if item.name != LOCK] if out.is_dir() else [])
    if settings.overwrite_output_dir or not others:
        return None
    if not found:
        if file.exists() and not any(out.glob("*.safetensors")):
            return None  # killed before its first checkpoint
        raise UserError(f"{out}: already holds files; set overwrite_output_dir or choose another output_dir")
    if file.exists():
        _compare(file, state)
    newest = kept.newest(world)
    assert newest is not None
    if world.rank == 0:
        notice(f"resuming from {newest[0]}")
    return str(newest[0])


def _read_state(path: Path) -> dict[str, Any]:
    """Trainer's state, and the fingerprints of the files; earlier versions wrote none."""
    state: dict[str, Any] = read_sealed(path / TRAINER)
    marks = read_sealed(path / MARKS)["files"] if (path / MARKS).exists() else {}
    return {"step": state["global_step"], "files": marks}


def clear_unfinished(out: Path) -> None:
    """Delete checkpoints that were being written. Trainer writes its state after everything else of one."""
    checkpoints_of(out).clear_leftovers()
    for path in checkpoints_of(out).all():
        if not (path / TRAINER).exists():
            notice(f"{path}: incomplete, because the run was stopped while writing it; deleted")
            shutil.rmtree(path, ignore_errors=True)


def _compare(file: Path, state: dict[str, Any]) -> None:
    """Raise UserError, naming the differences, if the run of ``file`` has another state."""
    begun = read_object(file)
    # Read anew, so that names and defaults of an older version do not count as differences.
    values = {"output_dir": str(file.parent), **begun["settings"]}
    before = {k: v for k, v in to_values(read_settings(values, str(file))).items() if k not in FREE}
    now = json.loads(json.dumps(state, default=str))
    changed = [
        f"{name} ({before.get(name)} → {now['settings'].get(name)})"
        for name in {**before, **now["settings"]}
        if before.get(name) != now["settings"].get(name)
    ]
    if changed or (begun["train"], begun["valid"]) != (now["train"], now["valid"]):
        raise UserError(
            f"{file.parent}: this run began with other {', '.join(changed) or 'data'}; restore them, choose "
            "another output_dir, or set overwrite_output_dir to start over"
        )
