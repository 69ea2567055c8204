"""What identifies a run, and the checkpoint from which the same command continues it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xverse.config import UserError
from xverse.files import atomic_file
from xverse.finetune.encode import Data, Example
from xverse.finetune.settings import Settings, read_settings, to_values
from xverse.log import notice

STATE = "finetune.json"
# Settings that may differ between a run and its continuation.
FREE = {
    "output_dir", "overwrite_output_dir", "overwrite_cache", "plot_loss", "resume_from_checkpoint",
    "preprocessing_num_workers", "padding_side", "local_rank", "do_eval", "report_to", "run_name",
    "disable_tqdm", "save_steps", "save_total_limit", "logging_steps", "logging_first_step", "dataset_dir",
    "dataloader_num_workers", "dataloader_pin_memory", "early_stopping_steps", "ddp_timeout", "save_dtype",
    "generation",
}  # fmt: skip


def run_state(settings: Settings, data: Data) -> dict[str, Any]:
    """What decides the losses of a run: its settings, and digests of its examples."""
    kept = {name: value for name, value in to_values(settings).items() if name not in FREE}
    return {"settings": kept, "train": _digest(data.train), "valid": _digest(data.valid)}


def write_state(settings: Settings, state: dict[str, Any]) -> None:
    with atomic_file(settings.output_dir / STATE) as path:
        path.write_text(json.dumps(state, indent=1), encoding="utf-8")


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(str((example.ids, example.mask)).encode())
    return digest.hexdigest()


def resume_point(settings: Settings, state: dict[str, Any]) -> str | None:
    """The checkpoint to resume from, or None for a new run.

    Raises UserError if the folder holds another run or other files.
    """
    out, first = settings.output_dir, int(os.environ.get("RANK", "0")) == 0
    if settings.resume_from_checkpoint not in (None, "true", "True"):
        assert settings.resume_from_checkpoint is not None
        if not Path(settings.resume_from_checkpoint).is_dir():
            raise UserError(f"resume_from_checkpoint: no such folder: {settings.resume_from_checkpoint}")
        return settings.resume_from_checkpoint
    if settings.overwrite_output_dir or not out.is_dir() or not any(out.iterdir()):
        if first:
            (out / "metrics.jsonl").unlink(missing_ok=True)
        return None
    checkpoint = _last_checkpoint(out)
    file = out / STATE
    if checkpoint is None:
        if file.exists() and not any(out.glob("*.safetensors")):
            return None  # killed before its first checkpoint
        raise UserError(f"{out}: already holds files; set overwrite_output_dir or choose another output_dir")
    if file.exists():
        _compare(file, state)
    if first:
        notice(f"resuming from {checkpoint}")
    return checkpoint


def _compare(file: Path, state: dict[str, Any]) -> None:
    """Raise UserError, naming the differences, if the run of ``file`` has another state."""
    begun = json.loads(file.read_text(encoding="utf-8"))
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
            "another output_dir, or set overwrite_output_dir to start anew"
        )


def _last_checkpoint(out: Path) -> str | None:
    """The last complete checkpoint. Trainer writes its state file last, after everything else of one."""
    checkpoints = out.glob("checkpoint-*")
    for path in sorted(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return str(path)
        notice(f"{path}: incomplete, because the run was stopped while writing it; ignored")
    return None
