"""Compare training recipes: every run of a study, with several seeds, as a table and a plot.

python recipes/nano/study.py STUDY.yaml DATA OUT [--only NAME …] [--jobs N] [--threads N]

STUDY  a file with ``recipe`` (the base of all runs), ``overrides`` for all of them, and ``runs``: names, each
       with its overrides and seeds (default: 0)
DATA   output of ``xverse data prepare``
OUT    a folder for each run; a repeated call reads finished runs and resumes killed ones

The figure of a run is its final held-out bits per byte, averaged over all sources.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xverse.cli import Parser, guarded
from xverse.config import UserError, choose, load
from xverse.files import make_folder
from xverse.log import console
from xverse.train.plot import read_metrics
from xverse.values import whole


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One recipe of a study and its seeds."""

    overrides: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])


@dataclass(frozen=True, kw_only=True)
class Study:
    """``overrides`` apply to every run, before the run's."""

    recipe: Path
    runs: dict[str, Variant]
    overrides: list[str] = field(default_factory=list)


def train(study: Study, name: str, seed: int, data: Path, out: Path, threads: int) -> Path:
    """Run or resume one of a study's recipes; returns its folder. Raises UserError if it fails."""
    folder = out / f"{name}-{seed}"
    overrides = [
        *study.overrides,
        *study.runs[name].overrides,
        f"seed={seed}",
        f"data={data}",
        f"out={folder}",
    ]
    if not (folder / "recipe.json").exists():  # the last file that a run writes but for its report
        command = [sys.executable, "-m", "xverse.cli", "pretrain", str(study.recipe), *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        log = out / f"{folder.name}.log"
        with log.open("w") as stream:
            ran = subprocess.run(command, env=environment, stdout=stream, stderr=stream, check=False)
        if ran.returncode:
            raise UserError(f"{folder.name}: ended with code {ran.returncode}; {log} says why")
        console.print(f"{folder.name}: {result(folder)['bits']:.4f} bits per byte", markup=False)
    return folder


def result(folder: Path) -> dict[str, Any]:
    """Mean bits per byte at a run's end, its steps and tokens, the loss by tokens."""
    records = read_metrics(folder / "metrics.jsonl")
    valid = [record["valid"] for record in records if "valid" in record][-1]
    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    steps = [record for record in records if "loss" in record]
    tokens, curve = 0.0, []
    for record in steps:
        tokens += record["tokens_per_second"] * record["seconds"]
        curve.append((tokens, record["loss"]))
    return {
        "bits": statistics.fmean(valid.values()),
        "steps": recipe["train"]["steps"],
        "tokens": round(tokens),
        "seconds": sum(record["seconds"] for record in steps),
        "curve": curve,
    }


def show(study: Study, folders: dict[str, list[Path]], out: Path) -> None:
    """The table on the console and in ``study.json``, the curves in ``study.png``."""
    rows = {}
    for name, mine in folders.items():
        results = [result(folder) for folder in mine]
        bits = [item["bits"] for item in results]
        rows[name] = {
            "overrides": study.runs[name].overrides,
            "seeds": study.runs[name].seeds,
            "tokens": results[0]["tokens"],
            "steps": results[0]["steps"],
            "bits_per_byte": [round(value, 4) for value in bits],
            "mean": round(statistics.fmean(bits), 4),
            "seconds": round(statistics.fmean(item["seconds"] for item in results)),
        }
    (out / "study.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    width = max(map(len, rows))
    for name, row in sorted(rows.items(), key=lambda item: item[1]["mean"]):
        spread = (
            f" ({' '.join(f'{value:.4f}' for value in row['bits_per_byte'])})"
            if len(row["seeds"]) > 1
            else ""
        )
        console.print(
            f"{name:{width}}  {row['tokens'] / 1e6:6.2f}M tokens  {row['steps']:6,} steps  "
            f"{row['mean']:.4f} bits per byte{spread}",
            markup=False,
            soft_wrap=True,
        )
    plot({name: result(mine[0])["curve"] for name, mine in folders.items()}, out / "study.png")


def plot(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Plot training losses over tokens; each point is the mean of a fiftieth of its run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens (millions)", ylabel="training loss (nats per token)")
    for name, curve in curves.items():
        size = max(1, len(curve) // 50)
        groups = [curve[first : first + size] for first in range(0, len(curve) - size + 1, size)]
        points = [[statistics.fmean(column) for column in zip(*group, strict=True)] for group in groups]
        axes.plot([x / 1e6 for x, _ in points], [y for _, y in points], label=name, linewidth=1.2)
    axes.set_ylim(top=min(7.0, axes.get_ylim()[1]))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> int:
    return guarded("study", _study)


def _study() -> int:
    parser = Parser(
        prog="study.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--jobs", type=whole(1, 1024), default=1, metavar="N", help="runs at a time")
    parser.add_argument("--threads", type=whole(1, 1024), default=1, metavar="N", help="of each run")
    args = parser.parse_args()
    study = load(Study, args.study)
    for name in args.only or ():
        choose("run", name, study.runs)
    chosen = {name: run for name, run in study.runs.items() if not args.only or name in args.only}
    make_folder(args.out)
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = {
            name: [
                pool.submit(train, study, name, seed, args.data, args.out, args.threads) for seed in run.seeds
            ]
            for name, run in chosen.items()
        }
        folders = {name: [run.result() for run in runs] for name, runs in waiting.items()}
    show(study, folders, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
