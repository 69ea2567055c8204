"""torchrun starts a run again after kills; the losses are those of a run that nobody killed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xverse.train.checkpoint import kept
from xverse.train.plot import read_metrics

STEPS, EVERY = 48, 4
SEED = 20  # of which process is killed, and when


def losses(out: Path) -> dict[int, tuple[float, float, float]]:
    file = out / "metrics.jsonl"
    records = [record for record in read_metrics(file) if "loss" in record] if file.exists() else []
    return {record["step"]: (record["loss"], record["grad_norm"], record["lr"]) for record in records}


def beat(out: Path, rank: int) -> dict[str, Any]:
    return json.loads((out / "heartbeats" / f"{rank}.json").read_text())


def test_kill_of_any_process_at_any_moment_loses_no_more_than_since_the_last_checkpoint(
    write_recipe: Callable[..., Path], torchrun: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = write_recipe(steps=STEPS, dtype="float32", checkpoint_every=EVERY, parallel="fsdp")
    unharmed, out = tmp_path / "unharmed", tmp_path / "run"
    undisturbed = torchrun(2, str(recipe), f"out={unharmed}")
    output, _ = undisturbed.communicate()
    assert undisturbed.returncode == 0, output
    process = torchrun(2, str(recipe), restarts=3)
    chance = random.Random(SEED)
    killed: set[int] = set()
    for number in range(3):
        wanted = 12 * (number + 1) + chance.randint(-5, 5)
        while max(losses(out), default=0) < wanted:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        rank = chance.randint(0, 1)
        time.sleep(chance.uniform(0, 0.05))
        pid = beat(out, rank)["pid"]
        assert pid not in killed
        killed.add(pid)
        before = max(losses(out))
        os.kill(pid, signal.SIGKILL)
        saved = int(kept(out).all()[-1].name[5:])
        assert before + 1 - saved <= 2 * EVERY, "the newest checkpoint may have been under way"
        resumed = 0
        while resumed <= number:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
            resumed = process.said().count("resuming from")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert losses(out) == losses(unharmed)
    assert list(losses(out)) == list(range(STEPS))
    assert [beat(out, rank)["status"] for rank in (0, 1)] == ["finished", "finished"]
