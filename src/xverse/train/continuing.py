"""From which checkpoint a run continues: one of its own, or one of the run that it branches from.

A run may be prolonged, shortened or decay otherwise from any checkpoint up to which the learning rate of
every step stays the same: under the wsd schedule from every one before the decay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xverse.config import UserError
from xverse.train.checkpoint import kept
from xverse.train.keeping import Kept, State
from xverse.train.optimizer import learning_rate
from xverse.train.parallel import World
from xverse.train.settings import TrainConfig

# Keys of a run's identity that only determine the learning rate.
SCHEDULE = ("steps", "schedule", "learning_rate", "warmup_steps", "decay_share", "final_lr_ratio")


def find_checkpoint(
    out: Path, world: World, identity: Mapping[str, Any], config: TrainConfig, source: Path | None
) -> tuple[Path, State] | None:
    """The newest checkpoint in ``out``, or else in ``source``, from which the run can continue, and its
    state; None where ``out`` has none and no source is given.

    Later checkpoints of ``out`` are set aside. Raises UserError where the checkpoints belong to another run,
    or the learning rate of their steps was another.
    """
    own = kept(out)
    if world.rank == 0:
        own.clear_leftovers()
    found = _find(own, out, world, identity, config)
    if found is not None:
        if world.rank == 0:
            for later in own.all():
                if own.step(later) > found[1]["step"]:
                    aside = own.set_aside(later, "superseded-")
                    world.say(f"{later.name} followed another schedule; it is kept as {aside.name}")
        world.wait()
    elif source is not None:
        found = _find(_kept_at(source), source, world, identity, config)
        if found is None:
            raise UserError(f"resume_from: {source} has no checkpoints")
    return found


def _kept_at(source: Path) -> Kept:
    """The checkpoints of a run's folder, or the single one of a checkpoint's folder."""
    if not source.is_dir():
        raise UserError(f"resume_from: no such folder: {source}")
    if (source / "state.json").is_file():
        return dataclasses.replace(kept(source), only=source, own=False)
    return dataclasses.replace(kept(source), own=False)


def _find(
    where: Kept, shown: Path, world: World, identity: Mapping[str, Any], config: TrainConfig
) -> tuple[Path, State] | None:
    unusable: list[State] = []

    def usable(path: Path, state: State) -> bool:
        _check_identity(shown, state["identity"], identity)
        if same_rates(state["identity"], config, state["step"]):
            return True
        unusable.append(state)
        return False

    found = where.newest(world, usable)
    if found is None and unusable:
        raise UserError(f"{shown}: {_why(unusable[0], identity)}")
    return found


def same_rates(begun: Mapping[str, Any], config: TrainConfig, step: int) -> bool:
    """Whether the first ``step`` steps of a run with the identity ``begun`` had the learning rates that
    ``config`` gives them, and are not more than it has."""
    changed = {key: begun[key] for key in SCHEDULE if key in begun and begun[key] != getattr(config, key)}
    if not changed:
        return True
    before = dataclasses.replace(config, **changed)
    return step <= config.steps and all(
        learning_rate(done, before) == learning_rate(done, config) for done in range(step)
    )


def _why(state: State, identity: Mapping[str, Any]) -> str:
    begun = state["identity"]
    changed = difference(_only(begun, SCHEDULE), _only(identity, SCHEDULE))
    text = f"this run was begun with {changed}; its {state['step']} steps had other learning rates"
    if begun.get("schedule") == "wsd" and changed.startswith(("steps", "decay_share", "final_lr_ratio")):
        return (
            f"{text}, and no checkpoint from before the decay is left; set it back, or begin another out "
            "from its weights with model: and a new schedule"
        )
    return f"{text}; set it back or change out (only schedule wsd can be prolonged)"


def _check_identity(shown: Path, begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError for any difference that is not the schedule's."""
    both = (begun.keys() & now.keys()) - set(SCHEDULE)  # a key on one side only is another version's
    differs = difference(_only(begun, both), _only(now, both))
    if differs:
        why = ""
        if differs.startswith("mixture") and begun.get("steps") != now.get("steps"):
            why = " (the caps in mixture.epochs depend on train.steps)"
        raise UserError(f"{shown}: this run was begun with {differs}{why}; set it back or change out")


def _only(values: Mapping[str, Any], keys: Any) -> dict[str, Any]:
    return {key: values[key] for key in keys if key in values}


def difference(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> str:
    """The first key that differs, with its path: ``mixture.zh = 0.5, not 0.4``; or an empty string."""
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            inner = difference(old, new, f"{path}{key}.")
            if inner:
                return inner
        elif old != new:
            return f"{path}{key} = {old}, not {new}"
    return ""
