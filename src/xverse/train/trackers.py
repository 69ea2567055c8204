"""The figures of a run in TensorBoard and Weights & Biases, in addition to ``metrics.jsonl``."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from xverse.config import UserError, need
from xverse.log import notice


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in ``out/tensorboard``. Steps repeated after a rollback replace the earlier ones."""

    def __init__(self, out: Path, first_step: int, settings: Mapping[str, Any]) -> None:
        need("tensorboard", "track", "trackers: tensorboard", load=False)
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


@contextlib.contextmanager
def tracker_errors(what: str) -> Iterator[None]:
    """Raise UserError, in one line, for an error of W&B, such as a missing login."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "wandb":
            raise
        text = " ".join(str(error).split())
        raise UserError(f"{what}: {text} (WANDB_MODE=offline writes files only)") from None


class WandB:
    """One Weights & Biases run for each run folder, also after restarts, with its files in ``out/wandb``.

    Its environment variables apply: WANDB_PROJECT, WANDB_MODE=offline.
    """

    def __init__(self, out: Path, first_step: int, settings: Mapping[str, Any]) -> None:
        wandb = need("wandb", "track", "trackers: wandb")
        file = out / "wandb-run"
        if not file.exists():
            file.write_text(uuid.uuid4().hex, encoding="utf-8")
        with tracker_errors("trackers: wandb"):
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "xverse"), dir=str(out), name=out.resolve().name,
                id=file.read_text(encoding="utf-8").strip(), resume="allow", config=dict(settings),
            )  # fmt: skip
        self._run.define_metric("*", step_metric="step")  # W&B's counter never decreases, a run's step may

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


KINDS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


class Trackers:
    """All trackers of a recipe. One that fails is reported and dropped; the run continues."""

    def __init__(self, names: Iterable[str], out: Path, first_step: int, settings: Mapping[str, Any]) -> None:
        self._open = {name: KINDS[name](out, first_step, settings) for name in names}  # type: ignore[call-arg]

    def log(self, record: Mapping[str, Any]) -> None:
        """Log the numbers in a record of ``metrics.jsonl`` at ``step`` + 1."""
        values = dict(_numbers({key: value for key, value in record.items() if key != "step"}))
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(record["step"] + 1, values)
            except Exception as error:
                notice(f"WARNING: {name} failed and gets no more figures: {error}")
                del self._open[name]

    def close(self) -> None:
        for name, tracker in self._open.items():
            try:
                tracker.close()
            except Exception as error:
                notice(f"WARNING: {name} could not be closed: {error}")


def _numbers(record: Mapping[str, Any], path: str = "train/") -> Iterable[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{path}{key}", float(value)
