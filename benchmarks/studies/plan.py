"""The cost model against published measurements: the fit of its constants, and how well it predicts a source
that the fit left out. Prints the tables of benchmarks/plan.md."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from xverse.config import build
from xverse.plan.cost import Constants, Passes, Software, predict
from xverse.plan.devices import Device, Kernel, find_device
from xverse.plan.layout import Architecture, Layout

FILE = Path(__file__).with_name("plan.yaml")
_START = Constants(0.75, 0.6, 0.6, 0.7)
# A share beyond these would be wrong; collectives reach at most nine tenths of a link.
_LEAST, _MOST = Constants(0.3, 0.3, 0.3, 0.3), Constants(1.0, 1.0, 1.0, 0.9)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row of ``plan.yaml``, whose head says what the keys mean."""

    source: str
    model: str
    device: str
    length: int
    layout: Layout
    passes: Passes
    recompute: tuple[float, ...] = (0.0, 0.0, 0.0)
    tokens: float | None = None
    model_tflops: float | None = None
    hardware_tflops: float | None = None
    network: float | None = None
    bandwidth: float | None = None
    flops: float | None = None
    attention: Kernel = "flash2"
    resharded: bool = True
    accumulate_locally: bool = False
    balanced: bool = False
    tensor_backward: float = 1.0
    gradient_bytes: int = 4
    gpus_per_machine: int | None = None

    @functools.cached_property
    def device_there(self) -> Device:
        device = find_device(
            self.device,
            network=self.network,
            bandwidth=self.bandwidth,
            flops=self.flops,
            gpus_per_machine=self.gpus_per_machine,
        )
        return dataclasses.replace(device, attention=self.attention)

    @functools.cached_property
    def software(self) -> Software:
        products, attention, elementwise = self.recompute
        return Software(
            passes=self.passes,
            recompute=(products, attention, elementwise),
            resharded=self.resharded,
            accumulate_locally=self.accumulate_locally,
            balanced=self.balanced,
            gradient_bytes=self.gradient_bytes,
            tensor_backward=self.tensor_backward,
            ends_bytes=2,
            chunked_loss=False,
        )


@dataclass(frozen=True)
class Measurements:
    sources: dict[str, dict[str, Any]]
    models: dict[str, Architecture]
    measurements: list[Measurement] = field(default_factory=list)

    def measured(self, row: Measurement) -> float:
        """Tokens per second and GPU."""
        arch = self.models[row.model]
        if row.tokens is not None:
            return row.tokens
        if row.model_tflops is not None:
            return row.model_tflops * 1e12 / arch.flops_per_token(row.length)["full"]
        assert row.hardware_tflops is not None
        layers, hidden, length = arch.layers, arch.hidden_size, row.length
        terms = 1 + length / (6 * hidden) + arch.vocab_size / (16 * layers * hidden)
        return row.hardware_tflops * 1e12 / (96 * layers * hidden**2 * terms)

    def predicted(self, row: Measurement, constants: Constants) -> float:
        """Tokens per second and GPU."""
        arch, device, software = self.models[row.model], row.device_there, row.software
        found = predict(arch, row.layout, device, row.length, constants, software)
        return found.tokens_per_second

    def errors(self, rows: Iterable[Measurement], constants: Constants) -> list[float]:
        """By how much each prediction is above what was measured, as a share of that."""
        return [self.predicted(row, constants) / self.measured(row) - 1 for row in rows]


def read_measurements() -> Measurements:
    text = FILE.read_text(encoding="utf-8")
    return build(Measurements, yaml.safe_load(text), FILE.name)


def fit(known: Measurements, rows: Sequence[Measurement]) -> Constants:
    """The constants with the least squared logarithmic errors over ``rows``, every source weighing the same
    (Levenberg and Marquardt's method, within ``_LEAST`` and ``_MOST``). Where a share meets its bound, it may
    stop short of the optimum. ``FITTED`` and every figure of benchmarks/plan.md are this method's."""
    counts = {row.source: sum(other.source == row.source for other in rows) for row in rows}
    weights = np.array([counts[row.source] ** -0.5 for row in rows])  # [rows]

    def residuals(logs: np.ndarray) -> np.ndarray:
        constants = Constants(*(float(value) for value in np.exp(logs)))
        return np.array([math.log(1 + error) for error in known.errors(rows, constants)]) * weights

    logs = np.log(dataclasses.astuple(_START))
    now, damping = residuals(logs), 1e-3
    while damping < 1e3:
        steps = 1e-4 * np.eye(len(logs))
        slopes = np.stack([(residuals(logs + step) - now) / 1e-4 for step in steps], axis=1)
        move = np.linalg.solve(slopes.T @ slopes + damping * np.eye(len(logs)), -slopes.T @ now)
        bounds = [np.log(dataclasses.astuple(bound)) for bound in (_LEAST, _MOST)]
        moved = np.clip(logs + move, *bounds)
        then = residuals(moved)
        gain = now @ now - then @ then
        if gain > 0:
            logs, now, damping = moved, then, damping / 3
            if gain < 1e-4 * (now @ now):
                break
        else:
            damping *= 8
    return Constants(*(round(float(value), 3) for value in np.exp(logs)))


def leave_one_out(known: Measurements) -> dict[str, tuple[Constants, list[float]]]:
    """For each source: the constants fitted to all the others, and the errors on its own rows."""
    found = {}
    for source in known.sources:
        others = [row for row in known.measurements if row.source != source]
        own = [row for row in known.measurements if row.source == source]
        constants = fit(known, others)
        found[source] = constants, known.errors(own, constants)
    return found


def arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    known = read_measurements()
    constants = fit(known, known.measurements)
    unseen = leave_one_out(known)
    print(_tables(known, constants, unseen))
    sizes = [abs(error) for _, errors in unseen.values() for error in errors]
    return {
        "constants": dataclasses.asdict(constants),
        "sources": len(unseen),
        "measurements": len(sizes),
        "median_error": statistics.median(sizes),
        "worst_error": max(sizes),
    }


def _tables(
    known: Measurements, constants: Constants, unseen: dict[str, tuple[Constants, list[float]]]
) -> str:
    sizes = [abs(error) for _, errors in unseen.values() for error in errors]
    lines = [
        f"Fitted to all: {constants}.", "",
        f"Leave one source out: median error {100 * statistics.median(sizes):.1f} %, "
        f"worst {100 * max(sizes):.1f} %, {len(sizes)} measurements of {len(unseen)} sources.", "",
        "| source left out | its rows | median | worst | constants from the others |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for source, (others, errors) in unseen.items():
        values = [abs(error) for error in errors]
        shares = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(others).items())
        lines.append(
            f"| {source} | {len(errors)} | {100 * statistics.median(values):.1f} % | "
            f"{100 * max(values):.1f} % | {shares} |"
        )
    lines += ["", "| source | model | GPUs | T | layout | measured | unseen | error | all | error |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for source, (others, errors) in unseen.items():
        rows = [row for row in known.measurements if row.source == source]
        for row, error in zip(rows, errors, strict=True):
            measured, inside = known.measured(row), known.predicted(row, constants)
            again = "/".join(f"{share:g}" for share in row.recompute)
            lines.append(
                f"| {source} | {row.model} | {row.layout.processes} {row.device} | {row.length:,} | "
                f"{str(row.layout).rpartition(', checkpointing')[0]}, {row.passes}, again {again} | "
                f"{measured:,.0f} | {known.predicted(row, others):,.0f} | {100 * error:+.1f} % | "
                f"{inside:,.0f} | {100 * (inside / measured - 1):+.1f} % |"
            )
    return "\n".join(lines)
