"""The report of a finished run: speed against its bound, where the time went, memory, curve."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xverse.files import write_text
from xverse.hardware import device_peaks, peak_memory
from xverse.markdown import table
from xverse.model import XverseConfig
from xverse.train.memory import predicted_memory
from xverse.train.parallel import ALONE, World
from xverse.train.plot import read_metrics
from xverse.train.settings import TrainConfig, layout_of


@dataclass(frozen=True)
class Peak:
    """Peak FLOP/s of one device: the vendor's figure (for FP8 if ``fp8``) or, without one, the matmul rate
    that the pre-flight check measured (``measured``)."""

    flops: float
    measured: bool
    fp8: bool = False

    @property
    def name(self) -> str:
        """Key of the share in records."""
        return "matmul" if self.measured else "mfu_of_fp8" if self.fp8 else "mfu"

    @property
    def label(self) -> str:
        """Label of the share in reports."""
        return "MFU, of the FP8 peak" if self.fp8 else "MFU"


def peak_of(device: torch.device, matmul: float | None, fp8: bool = False) -> Peak | None:
    """The peak that shares refer to; ``matmul`` is the FLOP/s that the pre-flight check measured."""
    if device.type == "cuda":
        peaks = device_peaks(torch.cuda.get_device_name(device))
        flops = (peaks.fp8_flops if fp8 else peaks.bf16_flops) if peaks else None
        return Peak(flops, False, fp8) if flops else None
    return Peak(matmul, True) if matmul else None


def precision(config: TrainConfig) -> str:
    """The dtypes of a run's computation, for reports."""
    return f"float8 in the layers' matrices, {config.dtype} elsewhere" if config.float8 else config.dtype


def figures(records: list[dict[str, Any]]) -> dict[str, float]:
    """Totals of a run's records: applied and skipped steps, seconds by use, goodput (the share of the time
    from the first record to the last, pauses between restarts included, spent in applied steps)."""
    applied: dict[int, dict[str, Any]] = {}
    skipped = 0
    for record in records:
        if "loss" in record:
            applied[record["step"]] = record
        skipped += "skipped" in record
        if "rollback" in record:  # it undid what came after that checkpoint
            applied = {step: value for step, value in applied.items() if step < record["rollback"]}
    steps = list(applied.values())
    seconds = sum(record.get("seconds", 0.0) for record in steps)
    tokens = sum(record.get("seconds", 0.0) * record.get("tokens_per_second", 0.0) for record in steps)
    wall = records[-1]["time"] - records[0]["time"] + records[0].get("seconds", 0.0)
    stalls = [record["checkpoint"]["stall_seconds"] for record in records if "checkpoint" in record]
    beside = [record["seconds"] for record in steps if "beside_checkpoint" in record]
    alone = [
        record["seconds"] for record in steps if "seconds" in record and "beside_checkpoint" not in record
    ]
    slower = len(beside) * (statistics.mean(beside) - statistics.median(alone)) if beside and alone else 0.0
    resumes = [record["resume_seconds"] for record in records if "resume_seconds" in record]
    profiled = [record for record in steps if "communication" in record]
    exposed = [record["communication"]["exposed_seconds"] / record["seconds"] for record in profiled]
    return {
        "steps": len(steps),
        "skipped": skipped,
        "rollbacks": sum("rollback" in record for record in records),
        "tokens": tokens,
        "seconds": seconds,
        "data_seconds": sum(record.get("data_seconds", 0.0) for record in steps),
        "wall": wall,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "goodput": min(1.0, seconds / wall) if wall else 1.0,
        "checkpoints": len(stalls),
        "stall_seconds": sum(stalls),
        "beside_seconds": max(0.0, slower),
        "resumes": len(resumes),
        "resume_seconds": sum(resumes),
        "profiled": len(profiled),
        "exposed": statistics.mean(exposed) if exposed else 0.0,
    }


def write_report(
    out: Path, title: str, shape: XverseConfig, config: TrainConfig, length: int, world: World = ALONE
) -> Path:
    """Write ``out/report.md`` from ``out/metrics.jsonl``; ``length`` in tokens."""
    file = out / "metrics.jsonl"
    records = read_metrics(file) if file.exists() else []
    losses = [record for record in records if "loss" in record]
    if not losses:
        return out / "report.md"
    totals = figures(records)
    cuda = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if cuda else "CPU"
    checks = [record["preflight"] for record in records if "preflight" in record]
    how = config.parallel + (
        f" ({layout_of(config, world.size, shape).mesh})" if config.parallel == "fsdp" else ""
    )
    lines = [f"# {title}", "", f"{world.size} × {device}, {how}, {precision(config)}", ""]
    rows = [
        *_rows(totals, losses, config, world),
        *_speed(totals, shape, length, world, checks, config.float8),
    ]
    lines += table(["", ""], rows, "---")
    predicted = predicted_memory(shape, config, length, world.size, world.device.type)
    what = "most allocated on the GPU" if cuda else "peak resident memory of the process, libraries included"
    sizes = {f"{kind}, predicted": size for kind, size in predicted.items()}
    sizes |= {"all, predicted": sum(predicted.values()), what: peak_memory(world.device)}
    rows = [(name, f"{size / 2**20:,.1f}") for name, size in sizes.items()]
    lines += ["", "## Memory of one process", "", *table(["", "MiB"], rows, "---:")]
    if checks:
        lines += _preflight(checks[-1])
    valid = [record for record in records if record.get("valid")]
    if valid:
        losses_of = [
            [f"step {record['step'] + 1}", *(f"{value:.3f}" for value in record["valid"].values())]
            for record in valid
        ]
        lines += ["", "## Validation", "", *table(["", *valid[-1]["valid"]], losses_of, "---:")]
    if (out / "loss.png").exists():
        lines += ["", "![loss](loss.png)"]
    write_text(out / "report.md", "\n".join(lines) + "\n")
    return out / "report.md"


def _rows(
    totals: dict[str, float], losses: list[dict[str, Any]], config: TrainConfig, world: World
) -> Iterator[tuple[str, str]]:
    """Loss, and where the time went."""

    def share(seconds: float, of: float) -> str:
        return f"{100 * seconds / of:.1f} %" if of else "0.0 %"

    yield "loss, first and last step", f"{losses[0]['loss']:.4f} → {losses[-1]['loss']:.4f} nats"
    text = f"{totals['steps']:,} applied, {totals['skipped']:,} skipped, {totals['rollbacks']} rollbacks"
    yield "steps", text
    yield "tokens", f"{totals['tokens']:,.0f} at {totals['tokens_per_second']:,.0f} a second"
    waited = share(totals["data_seconds"], totals["seconds"])
    yield "waiting for data", f"{totals['data_seconds']:.1f} s, {waited} of the steps' time"
    yield "goodput", f"{100 * totals['goodput']:.1f} % of {totals['wall'] / 60:.1f} min"
    text = (
        f"{totals['checkpoints']} stalled training for {totals['stall_seconds']:.2f} s, "
        f"{share(totals['stall_seconds'], totals['wall'])} of the time; steps during their writing took "
        f"{totals['beside_seconds']:.2f} s more"
    )
    yield "checkpoints", text
    if totals["resumes"]:
        yield "resumed", f"{totals['resumes']} times, {totals['resume_seconds']:.1f} s to read and verify"
    if world.size == 1:
        text = "none: one process"
    elif totals["profiled"]:
        text = f"{100 * totals['exposed']:.1f} % of a step's time, in {totals['profiled']} profiled steps"
    else:
        text = f"not measured (communication_every: {config.communication_every})"
    yield "exposed communication", text


def _speed(
    totals: dict[str, float],
    shape: XverseConfig,
    length: int,
    world: World,
    checks: list[dict[str, Any]],
    fp8: bool,
) -> Iterator[tuple[str, str]]:
    matmul = min(reading["matmul"] for reading in checks[-1]["readings"]) if checks else None
    peak = peak_of(world.device, matmul, fp8)
    for kind, flops in shape.flops_per_token(length).items():
        rate = flops * totals["tokens_per_second"] / world.size
        text = "MFU unknown (no peak known for this device)"
        if peak:
            name = "of the matmul rate that the pre-flight check measured" if peak.measured else peak.label
            text = f"{100 * rate / peak.flops:.1f} % {name}"
        yield f"attention counted {kind}, T = {length}", f"{rate / 1e12:.3f} TFLOP/s a device; {text}"


def _preflight(check: dict[str, Any]) -> list[str]:
    head = ["process", "matmul, TFLOP/s", "memory, GB/s", "exchange, GB/s"]
    rows = [
        [
            f"rank {reading['rank']}, {reading['host']}, {reading['device']}",
            f"{reading['matmul'] / 1e12:.3f}",
            f"{reading['memory'] / 1e9:.1f}",
            f"{reading['exchange'] / 1e9:.2f}" if reading["exchange"] else "none",
        ]
        for reading in check["readings"]
    ]
    slow = [f"\n{line}" for line in check["slow"]]
    return ["", "## Pre-flight check", "", *table(head, rows, "---:"), *slow]
