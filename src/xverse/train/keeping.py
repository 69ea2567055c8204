"""The checkpoints in a run's folder, of pretraining and of fine-tuning: which are intact, which one a run
continues from, which are given up when the disk is full, and the lock that keeps a second run out."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from xverse.config import UserError
from xverse.files import alone, check_fingerprint, fingerprint, sync
from xverse.log import notice
from xverse.train.parallel import ALONE, World

READING = (OSError, ValueError, KeyError, TypeError, SafetensorError)
FULL = (errno.ENOSPC, errno.EDQUOT)
ASIDE = ("damaged-", "superseded-")  # of checkpoints that no run continues from

State = dict[str, Any]


@dataclass(frozen=True)
class Kept:
    """The checkpoints ``folder/PREFIX<step>``, or the ``only`` one. ``read_state`` raises one of READING for
    an incomplete one. ``forever``: whether the one of a step is never deleted to keep their number small.
    ``own``: whether they are this run's, to be renamed."""

    folder: Path
    prefix: str
    read_state: Callable[[Path], State]
    forever: Callable[[int], bool] = lambda step: False
    only: Path | None = None
    own: bool = True

    def all(self) -> list[Path]:
        """The finished checkpoints, oldest first."""
        if self.only is not None:
            return [self.only]
        found = [path for path in self.folder.glob(f"{self.prefix}*") if self.step(path) >= 0]
        return sorted(found, key=self.step)

    def step(self, path: Path) -> int:
        """The step of a checkpoint's name, -1 for other names."""
        number = path.name.removeprefix(self.prefix)
        return int(number) if number.isdigit() else -1

    def clear_leftovers(self) -> None:
        """Remove what a killed run was writing or deleting. Only for a run that holds the folder's lock."""
        for left in self.folder.glob(f".{self.prefix}*.tmp"):
            shutil.rmtree(left, ignore_errors=True)

    def remove(self, path: Path) -> None:
        hidden = path.with_name(f".{path.name}.old.tmp")  # must not look like a checkpoint after a kill
        path.replace(hidden)
        shutil.rmtree(hidden)

    def set_aside(self, path: Path, why: str) -> Path:
        """Rename a checkpoint from which no run continues; ``why`` is one of ASIDE."""
        target = path.with_name(f"{why}{path.name}")
        shutil.rmtree(target, ignore_errors=True)
        path.replace(target)
        return target

    def make_room(self, last: bool) -> bool:
        """Delete checkpoints of the newest one's size because the disk is full; returns whether any was.

        Those set aside go first, then the oldest that are not kept ``forever``; the newest one stays. With
        ``last``, when the run would lose its state otherwise, those kept forever follow, and then the newest:
        the next one has its size and is written at once.
        """
        aside = [path for prefix in ASIDE for path in self.folder.glob(f"{prefix}{self.prefix}*")]
        found = self.all()
        free = [path for path in found[:-1] if not self.forever(self.step(path))]
        candidates = [*sorted(aside), *free]
        if last:
            candidates += [path for path in found[:-1] if path not in free] + found[-1:]
        enough, freed = 0.9 * _size(found[-1]) if found else 0.0, 0  # sizes differ by a few lines of JSON
        for path in candidates:
            if freed and freed >= enough:
                break
            freed += _size(path)
            notice(f"WARNING: {path.name} is deleted to make room for the next checkpoint")
            self.remove(path)
        return freed > 0

    def newest(
        self, world: World = ALONE, usable: Callable[[Path, State], bool] = lambda path, state: True
    ) -> tuple[Path, State] | None:
        """The newest intact checkpoint that is ``usable``, and its state, or None. Every process calls it and
        verifies its share of the files that ``state["files"]`` lists with their fingerprints.

        Damaged ones are reported and renamed. Raises UserError if all are damaged.
        """
        damaged: list[tuple[Path, str]] = []
        for path in world.agreed(self.all()[::-1] if world.rank == 0 else []):
            state, problem = _state(path, self.read_state, world)
            if not problem and self.only is None and state["step"] != self.step(path):
                problem = f"it is of step {state['step']}"
            if not problem and not usable(path, state):
                continue
            try:
                if not problem:
                    verify(path, state["files"], world)
            except READING as error:
                problem = reason(error)
            problem = world.first(problem)
            if problem:
                damaged.append((path, f"{path}: this checkpoint cannot be read ({problem})"))
                continue
            if world.rank == 0:
                for aside, text in damaged:
                    notice(f"WARNING: {text}; going back to {path.name}")
                    if self.own:
                        self.set_aside(aside, "damaged-")
            return path, state
        if damaged:
            raise UserError(f"{damaged[0][1]}, and no earlier one is intact; delete it to start again")
        return None


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _state(path: Path, read: Callable[[Path], State], world: World) -> tuple[State, str]:
    """A checkpoint's state, in every process, or why it cannot be read."""
    state: State = {}
    problem = ""
    if world.rank == 0:
        try:
            state = read(path)
        except READING as error:
            problem = reason(error)
    return world.agreed((state, problem))


def verify(path: Path, files: dict[str, list[Any]], world: World = ALONE) -> None:
    """Compare this process's share of a folder's files with their fingerprints. Raises one of READING."""
    for name in sorted(files)[world.rank :: world.size]:
        check_fingerprint(path / name, files[name])


def fingerprints(path: Path, world: World = ALONE) -> dict[str, list[Any]]:
    """The fingerprints of all files below a folder, by relative name, after they are on the disk. Every
    process calls it and reads its share."""
    names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    names = world.agreed(names)
    own = {}
    for name in names[world.rank :: world.size]:
        sync(path / name)
        own[name] = fingerprint(path / name)
    return {name: mark for share in world.gathered(own) for name, mark in share.items()}


def reason(error: BaseException) -> str:
    """A short description of an error of reading or writing; torch wraps the errors of all processes."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    if isinstance(error, OSError) and error.errno:
        missing = isinstance(error, FileNotFoundError) and error.filename
        return (f"{Path(error.filename).name}: " if missing else "") + os.strerror(error.errno)
    text = " ".join(str(error).split())
    number = re.search(r"os error (\d+)", text)  # safetensors is Rust
    if number:
        return os.strerror(int(number[1]))
    if "inline_container" in text or "PytorchStreamWriter" in text:  # torch.save drops errno
        return os.strerror(errno.ENOSPC)
    return text[:300] or type(error).__name__


def is_full(problem: str) -> bool:
    """Whether ``reason``'s text is that of a full disk or an exhausted quota."""
    return any(text in problem for text in ("the disk is full", *map(os.strerror, FULL)))


@contextlib.contextmanager
def locked(out: Path, world: World) -> Iterator[None]:
    """Create and lock a run's folder: two runs in it would mix their records and checkpoints. Raises
    UserError, in every process, with the process and host that hold it, or if it cannot be written."""
    problem = ""
    with contextlib.ExitStack() as held:
        if world.rank == 0:
            try:
                held.enter_context(alone(out / LOCK, f"{out}: another process is training in this folder"))
            except (UserError, OSError) as error:
                problem = str(error) if isinstance(error, UserError) else f"{out}: {reason(error)}"
        problem = world.agreed(problem)
        if problem:
            raise UserError(problem)
        yield


LOCK = ".lock"
