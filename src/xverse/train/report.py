"""The report of a finished run: speed against its bound, where the time went, memory, curve."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xverse.files import atomic_file
from xverse.hardware import device_peaks, peak_memory
from xverse.model import XverseConfig
from xverse.train.memory import predicted_memory
from xverse.train.parallel import ALONE, World
from xverse.train.plot import read_metrics
from xverse.train.settings import TrainConfig, layout_of


@dataclass(frozen=True)
class Peak:
    """FLOP/s that one device could do: the vendor's figure, that for FP8 where the run has it (``fp8``), or
    where there is none the rate of a matmul that the pre-flight check measured (``measured``)."""

    flops: float
    measured: bool
    fp8: bool = False

    @property
    def name(self) -> str:
        """Of the share in records."""
        return "matmul" if self.measured else "mfu_of_fp8" if self.fp8 else "mfu"

    @property
    def label(self) -> str:
        """Of the share for people."""
        return "MFU, of the FP8 peak" if self.fp8 else "MFU"


def peak_of(device: torch.device, matmul: float | None, fp8: bool = False) -> Peak | None:
    """The bound of the share that is printed; ``matmul`` in FLOP/s is what the pre-flight check measured."""
    if device.type == "cuda":
        peaks = device_peaks(torch.cuda.get_device_name(device))
        flops = (peaks.fp8_flops if fp8 else peaks.bf16_flops) if peaks else None
        return Peak(flops, False, fp8) if flops else None
    return Peak(matmul, True) if matmul else None


def precision(config: TrainConfig) -> str:
    """What a run computes in, for people."""
    return f"float8 in the layers' matrices, else {config.dtype}" if config.float8 else config.dtype


def figures(records: list[dict[str, Any]]) -> dict[str, float]:
    """What a run's records say: counted and skipped steps, seconds by use, goodput (the share of the time
    from the first record to the last that went into steps that counted; pauses between restarts count)."""
    counted: dict[int, dict[str, Any]] = {}
    skipped = 0
    for record in records:
        if "loss" in record:
            counted[record["step"]] = record
        skipped += "skipped" in record
        if "rollback" in record:  # what came after that checkpoint was undone
            counted = {step: value for step, value in counted.items() if step < record["rollback"]}
    steps = list(counted.values())
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
    found = figures(records)
    cuda = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if cuda else "CPU"
    checks = [record["preflight"] for record in records if "preflight" in record]
    how = config.parallel + (
        f" ({layout_of(config, world.size, shape).mesh})" if config.parallel == "fsdp" else ""
    )
    lines = [f"# {title}", "", f"{world.size} × {device}, {how}, {precision(config)}", ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in _rows(found, losses, config, world)]
    lines += _speed(found, shape, length, world, checks, config.float8)
    lines += ["", "## Memory of one process", "", "| | MiB |", "|---|---|"]
    predicted = predicted_memory(shape, config, length, world.size, world.device.type)
    for kind, size in predicted.items():
        lines.append(f"| {kind}, predicted | {size / 2**20:,.1f} |")
    lines.append(f"| all, predicted | {sum(predicted.values()) / 2**20:,.1f} |")
    what = "most allocated on the GPU" if cuda else "peak resident memory of the process, libraries included"
    lines.append(f"| {what} | {peak_memory(world.device) / 2**20:,.1f} |")
    if checks:
        lines += _preflight(checks[-1])
    valid = [record for record in records if record.get("valid")]
    if valid:
        lines += ["", "## Validation", "", "| | " + " | ".join(valid[-1]["valid"]) + " |"]
        lines.append("|---" * (len(valid[-1]["valid"]) + 1) + "|")
        for record in valid:
            values = " | ".join(f"{value:.3f}" for value in record["valid"].values())
            lines.append(f"| step {record['step'] + 1} | {values} |")
    if (out / "loss.png").exists():
        lines += ["", "![loss](loss.png)"]
    with atomic_file(out / "report.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out / "report.md"


def _rows(
    found: dict[str, float], losses: list[dict[str, Any]], config: TrainConfig, world: World
) -> Iterator[tuple[str, str]]:
    """Loss and where the time went."""

    def share(seconds: float, of: float) -> str:
        return f"{100 * seconds / of:.1f} %" if of else "0.0 %"

    yield "loss, first and last step", f"{losses[0]['loss']:.4f} → {losses[-1]['loss']:.4f} nats"
    yield (
        "steps",
        (f"{found['steps']:,} applied, {found['skipped']:,} skipped, {found['rollbacks']} rollbacks"),
    )
    yield "tokens", f"{found['tokens']:,.0f} at {found['tokens_per_second']:,.0f} a second"
    waited = share(found["data_seconds"], found["seconds"])
    yield "waiting for data", f"{found['data_seconds']:.1f} s, {waited} of the steps' time"
    yield "goodput", f"{100 * found['goodput']:.1f} % of {found['wall'] / 60:.1f} min"
    yield (
        "checkpoints",
        (
            f"{found['checkpoints']} held the loop for {found['stall_seconds']:.2f} s, "
            f"{share(found['stall_seconds'], found['wall'])} of all; steps beside them took "
            f"{found['beside_seconds']:.2f} s more"
        ),
    )
    if found["resumes"]:
        yield "resumed", f"{found['resumes']} times, {found['resume_seconds']:.1f} s of reading and verifying"
    if world.size == 1:
        text = "one process, none"
    elif found["profiled"]:
        text = f"{100 * found['exposed']:.1f} % of the time of a step, in {found['profiled']} profiled ones"
    else:
        text = f"not measured (communication_every: {config.communication_every})"
    yield "communication not hidden", text


def _speed(
    found: dict[str, float],
    shape: XverseConfig,
    length: int,
    world: World,
    checks: list[dict[str, Any]],
    fp8: bool,
) -> list[str]:
    lines = []
    matmul = min(reading["matmul"] for reading in checks[-1]["readings"]) if checks else None
    peak = peak_of(world.device, matmul, fp8)
    for kind, flops in shape.flops_per_token(length).items():
        rate = flops * found["tokens_per_second"] / world.size
        text = "MFU unknown (no peak known for this device)"
        if peak:
            name = "of the matmul rate that the pre-flight check measured" if peak.measured else peak.label
            text = f"{100 * rate / peak.flops:.1f} % {name}"
        lines.append(
            f"| attention counted {kind}, T = {length} | {rate / 1e12:.3f} TFLOP/s a device; {text} |"
        )
    return lines


def _preflight(check: dict[str, Any]) -> list[str]:
    lines = ["", "## Pre-flight check", "", "| process | matmul, TFLOP/s | memory, GB/s | exchange, GB/s |"]
    lines.append("|---|---|---|---|")
    for each in check["readings"]:
        exchange = f"{each['exchange'] / 1e9:.2f}" if each["exchange"] else "alone"
        lines.append(
            f"| rank {each['rank']}, {each['host']}, {each['device']} | {each['matmul'] / 1e12:.3f} | "
            f"{each['memory'] / 1e9:.1f} | {exchange} |"
        )
    return lines + [f"\n{line}" for line in check["slow"]]
