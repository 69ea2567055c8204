"""The loss curve of a run as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xverse.log import notice


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``, in order of steps. A step that ran again after a kill stands once,
    as it last ran; a half-written last line is passed over."""
    steps: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        steps[record["step"], "valid" in record] = record
    return [steps[key] for key in sorted(steps)]


def plot_loss(out: Path, title: str) -> Path | None:
    """Draw ``out/loss.png`` from ``out/metrics.jsonl``; returns None where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        notice('no loss curve: matplotlib is missing; pip install "xverse-lm[track]"')
        return None
    records = read_metrics(out / "metrics.jsonl")
    train = [(record["step"] + 1, record["loss"]) for record in records if "loss" in record]
    valid = [(record["step"] + 1, record["valid"]) for record in records if "valid" in record]
    figure, axis = pyplot.subplots(figsize=(9, 5), layout="constrained")
    steps, losses = zip(*train, strict=True)
    axis.plot(steps, losses, color="0.8", linewidth=0.7, label="loss of each step")
    axis.plot(steps, _smooth(losses), color="tab:blue", label="smoothed")
    axis.set(xlabel="step", ylabel="training loss (nats per token)", title=title)
    handles, labels = axis.get_legend_handles_labels()
    if valid:
        right = axis.twinx()
        for name, color in zip(
            list(valid[-1][1])[:4], ("black", "tab:red", "tab:green", "tab:orange"), strict=False
        ):
            points = [(step, figures[name]) for step, figures in valid if name in figures]
            right.plot(
                *zip(*points, strict=True), "o--", markersize=3, color=color, label=f"validation: {name}"
            )
        right.set_ylabel("validation")
        handles, labels = (
            a + b for a, b in zip((handles, labels), right.get_legend_handles_labels(), strict=True)
        )
    axis.legend(handles, labels)
    axis.grid(alpha=0.3)
    path = out / "loss.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _smooth(values: tuple[float, ...], weight: float = 0.97) -> list[float]:
    smoothed, average, total = [], 0.0, 0.0
    for value in values:
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        smoothed.append(average / total)
    return smoothed
