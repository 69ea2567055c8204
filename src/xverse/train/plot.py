"""The loss curve of a run as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from xverse.config import UserError, need
from xverse.files import atomic_file
from xverse.log import notice

Figures = list[tuple[int, dict[str, float]]]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``, in order of steps.

    After a rollback the repeated steps replace the records from that step on; a truncated line is ignored.
    """
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        # Other records accompany that of their step, or note from which step a run resumes.
        trained = "loss" in record or "skipped" in record
        while records and records[-1]["step"] >= record["step"] + (not trained):
            records.pop()
        records.append(record)
    return records


def plot_loss(out: Path, title: str, validation: str = "nats per token") -> Path | None:
    """Draw ``out/loss.png`` from ``out/metrics.jsonl``; ``validation`` is the unit of its figures.

    Returns None if matplotlib is not installed or nothing is recorded.
    """
    try:  # not pyplot, which would open windows and change a notebook's backend
        matplotlib = need("matplotlib.figure", "track", "the loss curve")
    except UserError as error:
        notice(f"no loss curve: {error}")
        return None
    file = out / "metrics.jsonl"
    records = read_metrics(file) if file.exists() else []
    train = [(record["step"] + 1, record["loss"]) for record in records if "loss" in record]
    valid = [(record["step"] + 1, record["valid"]) for record in records if record.get("valid")]
    if not train:
        notice(f"no loss curve: {file} holds no steps")
        return None
    rewards = [
        (record["step"] + 1, record["reward"], record["reward_std"])
        for record in records
        if "reward" in record
    ]
    count = 1 + bool(valid) + bool(rewards)
    figure = matplotlib.Figure(figsize=(8 if count == 1 else 6 * count, 5), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, count, squeeze=False)[0]
    steps, losses = zip(*train, strict=True)
    smooth = _smooth(losses)
    panels[0].plot(steps, losses, color="0.8", linewidth=0.7, label="each step")
    panels[0].plot(steps, smooth, color="tab:blue", label=f"smoothed, at last {smooth[-1]:.3f}")
    panels[0].set_ylabel("training loss" if rewards else "training loss (nats per token)")
    if valid:
        _draw_validation(panels[1], valid)
        panels[1].set_ylabel(f"validation ({validation})")
    if rewards:  # of the replies of GRPO, with their deviation within a group
        rewarded_steps, means, deviations = (np.array(values) for values in zip(*rewards, strict=True))
        panels[-1].fill_between(rewarded_steps, means - deviations, means + deviations, color="0.9")
        panels[-1].plot(rewarded_steps, means, color="tab:green", label=f"reward, at last {means[-1]:.3f}")
        panels[-1].set_ylabel("reward")
    for panel in panels:
        panel.set(xlabel="step", xlim=(0, steps[-1] * 1.02))
        panel.grid(alpha=0.3)
        panel.legend()
    path = out / "loss.png"
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return path


def _draw_validation(panel: Any, valid: Figures) -> None:
    """One line for each figure. Of many, only the first ("all"), the highest and the lowest are labelled."""
    last = valid[-1][1]
    first, *others = last
    ranked = sorted(others, key=lambda name: last[name], reverse=True)
    named = [first, *(ranked if len(ranked) <= 5 else (ranked[0], ranked[-1]))]
    for name in (*ranked, first):
        points = [(step, figures[name]) for step, figures in valid if name in figures]
        style = {"color": "0.8"} if name not in named else {"label": f"{name} {last[name]:.3f}"}
        if name == first:
            style |= {"color": "black", "linewidth": "2.5"}
        panel.plot(*zip(*points, strict=True), "o-", markersize=3, zorder=2 + (name in named), **style)


def _smooth(values: tuple[float, ...], weight: float = 0.97) -> list[float]:
    smoothed, average, total = [], 0.0, 0.0
    for value in values:
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        smoothed.append(average / total)
    return smoothed
