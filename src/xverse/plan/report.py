"""A plan as a table, as JSON and as a chart."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from xverse.config import need
from xverse.files import atomic_file
from xverse.plan.cost import FITTED, Prediction
from xverse.plan.search import ROOM, Task

PARTS = {
    "matmul": "matrix products",
    "attention": "attention",
    "elementwise": "elementwise",
    "head": "head and loss",
    "recomputation": "recomputation",
    "tensor": "tensor parallel traffic",
    "context": "context parallel traffic",
    "sharding": "data parallel traffic, copies",
    "pipeline": "pipeline traffic",
    "bubble": "pipeline bubble",
    "optimizer": "optimizer",
}


# What predictions rest on, in one line of every report; benchmarks/plan.md has the errors.
BASIS = (
    "fitted to 90 published measurements of 8 sources, 8 to 16,384 A100 and H100; sources left out of the "
    "fit are predicted within 6 % (median) and at worst 28 %: too fast where a GPU has few tokens a step"
)


def settings(prediction: Prediction) -> dict[str, Any]:
    """The layout as keys of a recipe's ``train:`` section."""
    layout = prediction.layout
    keys: dict[str, Any] = {
        "parallel": "none" if layout.processes == 1 else "fsdp" if layout.shard > 1 else "ddp"
    }
    for name in ("replicate", "tensor", "context", "pipeline"):
        if getattr(layout, name) > 1 and keys["parallel"] == "fsdp":
            keys[name] = getattr(layout, name)
    if layout.pipeline > 1:
        keys["virtual_stages"] = layout.virtual_stages
    return {
        **keys,
        "batch_size": layout.sequences,
        "micro_batch_size": layout.micro_batch,
        "activation_checkpointing": layout.checkpointing,
        "compile": layout.compiles,
    }


def text(task: Task, name: str, chosen: list[Prediction], tokens: float, heading: str = "recommended") -> str:
    """The output of ``xverse plan``: the best layout in full, the others on one line each."""
    best = chosen[0]
    device, step = task.device, best.step
    unit, letter = (1e12, "T") if tokens >= 1e11 else (1e9, "B")
    kinds = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in dataclasses.asdict(best.memory).items())
    lines = [
        f"shape {name} on {task.gpus:,} × {device.name}, {task.length:,} tokens a sequence, "
        f"{task.sequences:,} sequences = {task.batch_tokens:,} tokens a step", "",
        f"{heading}: {best.layout}", "",
        f"  step            {step.seconds:10.3f} s",
        f"  tokens/s        {best.tokens_per_second * task.gpus:10,.0f}   "
        f"{best.tokens_per_second:,.0f} a GPU",
        f"  MFU             {100 * best.mfu(device):10.1f} % attention counted full, "
        f"{100 * best.mfu(device, causal=True):.1f} % causal",
        f"  {f'{tokens / unit:.4g}{letter} tokens':<15} {best.days(tokens):10.1f} days",
        f"  memory          {best.memory.total / 1e9:10.1f} GB of {device.memory / 1e9:,.0f} GB; {kinds}",
        "", "  where the time goes",
    ]  # fmt: skip
    for key, seconds in step.parts().items():
        if seconds > 0.0005 * step.seconds:
            share = seconds / step.seconds
            lines.append(f"    {PARTS[key]:<30}{100 * share:6.1f} %  {'▇' * round(40 * share)}")
    lines.append(f"    hidden communication, not counted: {100 * step.hidden / step.seconds:.1f} %")
    lines += ["", f"  {BASIS}"]
    if best.memory.total > ROOM * device.memory:
        lines.append(f"  it does not fit: {best.memory.total / 1e9:,.1f} GB of {device.memory / 1e9:,.0f} GB")
    if best.layout.zero1:
        lines.append("  this trainer does not run ZeRO-1; FSDP (zero=3) shares the optimizer states as well")
    if heading == "recommended":
        keys = ", ".join(f"{key}: {str(value).lower()}" for key, value in settings(best).items())
        lines += ["", "  in a recipe's train: section", f"    {keys}"]
    if len(chosen) > 1:
        lines += ["", "  other layouts", f"    {'s':>8}  {'MFU %':>6}  {'GB':>5}  layout"]
        for other in chosen[1:]:
            lines.append(
                f"    {other.step.seconds:8.3f}  {100 * other.mfu(device):6.1f}  "
                f"{other.memory.total / 1e9:5.1f}  {other.layout}"
            )
    return "\n".join(lines)


def figures(task: Task, name: str, chosen: list[Prediction], tokens: float) -> dict[str, Any]:
    """The same as one JSON-ready mapping; seconds, bytes and shares."""
    return {
        "shape": name,
        "gpus": task.gpus,
        "sequence_length": task.length,
        "batch_tokens": task.batch_tokens,
        "tokens": tokens,
        "device": dataclasses.asdict(task.device),
        "memory_allowed": ROOM * task.device.memory,
        "constants": dataclasses.asdict(FITTED),
        "basis": BASIS,
        "layouts": [
            {
                "layout": prediction.layout.keys(),
                "train": settings(prediction),
                "step_seconds": prediction.step.seconds,
                "tokens_per_second_per_gpu": prediction.tokens_per_second,
                "mfu_full": prediction.mfu(task.device),
                "mfu_causal": prediction.mfu(task.device, causal=True),
                "days": prediction.days(tokens),
                "memory": {**dataclasses.asdict(prediction.memory), "total": prediction.memory.total},
                "seconds": {**prediction.step.parts(), "hidden communication": prediction.step.hidden},
            }
            for prediction in chosen
        ],
    }


def chart(path: Path, task: Task, name: str, chosen: list[Prediction]) -> None:
    """Draw a bar for each layout, divided by where the time goes, the recommended layout on top.

    Raises UserError if matplotlib is not installed.
    """
    matplotlib = need("matplotlib.figure", "track", "--chart")
    figure = matplotlib.Figure(figsize=(12, 1.6 + 0.55 * len(chosen)), layout="constrained")
    axes = figure.subplots()
    rows = range(len(chosen))
    left = [0.0] * len(chosen)
    for key, label in PARTS.items():
        widths = [prediction.step.parts()[key] for prediction in chosen]
        if max(widths) > 0.002 * max(prediction.step.seconds for prediction in chosen):
            axes.barh(rows, widths, left=left, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(list(rows), [str(prediction.layout) for prediction in chosen], fontsize=8)
    axes.invert_yaxis()
    for row, prediction in enumerate(chosen):
        share = f"  {100 * prediction.mfu(task.device):.1f} % MFU"
        axes.text(prediction.step.seconds, row, share, va="center", fontsize=8)
    axes.set_xlim(0, 1.12 * max(left))
    axes.set_xlabel("predicted seconds per step")
    axes.set_title(f"{name} on {task.gpus:,} × {task.device.name}, {task.length:,} tokens a sequence")
    axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.4, -0.25))
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
