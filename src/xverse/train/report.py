"""The report of a finished run: speed against its bound, where the time went, memory, curve."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch

from xverse.files import atomic_file
from xverse.hardware import device_peaks
from xverse.model import XverseConfig
from xverse.train.plot import read_metrics
from xverse.train.settings import TrainConfig


def flops_per_token(config: XverseConfig, length: int) -> dict[str, int]:
    """Training FLOPs per token, forward and backward: 6 for each parameter but the embedding's, and
    attention counted full (12 · layers · d · T) or causal (half of that)."""
    linears = 6 * (config.num_parameters() - config.vocab_size * config.hidden_size)
    attention = 12 * config.num_hidden_layers * config.hidden_size * length
    return {"full": linears + attention, "causal": linears + attention // 2}


def predicted_memory(
    shape: XverseConfig, config: TrainConfig, length: int, processes: int = 1
) -> dict[str, int]:
    """Bytes that one process holds at its fullest, by kind.

    Activations are counted as autograd saves them: of each layer and token about 34 · d + 10 · d_ff bytes in
    bfloat16, twice that in float32, 4 · d where all is computed again. Score matrices, which attention in
    bfloat16 makes on a CPU, are left out. The head keeps its inputs' gradient and two chunks of logits.
    """
    parameters = shape.num_parameters()
    ends = 2 * shape.vocab_size * shape.hidden_size
    element = 2 if config.optimizer_dtype == "bfloat16" else 4
    moments = 2 * parameters - (parameters - ends if config.optimizer == "muon" else 0)
    share = processes if config.parallel == "fsdp" else 1
    rows = config.micro_batch_size or config.batch_size // processes
    size = 2 if config.dtype == "bfloat16" else 4
    layer = (17 * shape.hidden_size + 5 * shape.intermediate_size) * size
    if config.activation_checkpointing == "selective":
        layer = (8 * shape.hidden_size + 3 * shape.intermediate_size) * size
    elif config.activation_checkpointing == "full":
        layer = 4 * shape.hidden_size
    return {
        "parameters": 4 * parameters // share,
        "gradients": 4 * parameters // share,
        "optimizer": element * moments // share,
        "activations": rows * length * shape.num_hidden_layers * layer,
        "logits": 2 * 32 * 2**20 + rows * length * shape.hidden_size * 4,
    }


def measured_memory() -> tuple[str, int]:
    """What was measured, and its most so far in bytes: of the GPU, or of the whole process."""
    if torch.cuda.is_available():
        return "most allocated on the GPU", torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return (
        "peak resident memory of the process, libraries included",
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    )


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
    }


def write_report(
    out: Path, title: str, shape: XverseConfig, config: TrainConfig, length: int, processes: int = 1
) -> Path:
    """Write ``out/report.md`` from ``out/metrics.jsonl``; ``length`` in tokens."""
    file = out / "metrics.jsonl"
    records = read_metrics(file) if file.exists() else []
    if not records:
        return out / "report.md"
    found = figures(records)
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "CPU"
    peaks = device_peaks(device) if cuda else None
    speed = found["tokens_per_second"]
    lines = [f"# {title}", "", f"{processes} × {device}, {config.parallel}, {config.dtype}", ""]
    lines += ["| | |", "|---|---|"]
    losses = [record for record in records if "loss" in record]
    lines.append(f"| loss, first and last step | {losses[0]['loss']:.4f} → {losses[-1]['loss']:.4f} nats |")
    lines.append(
        f"| steps | {found['steps']:,} counted, {found['skipped']:,} passed over, "
        f"{found['rollbacks']} times back |"
    )
    lines.append(f"| tokens | {found['tokens']:,.0f} at {speed:,.0f} a second |")
    for kind, flops in flops_per_token(shape, length).items():
        rate = flops * speed / processes
        mfu = f"{100 * rate / peaks.bf16_flops:.1f} %" if peaks else "unknown (no peak known for this device)"
        lines.append(
            f"| attention counted {kind}, T = {length} | {rate / 1e12:.3f} TFLOP/s a device; MFU {mfu} |"
        )
    share = found["data_seconds"] / found["seconds"] if found["seconds"] else 0.0
    lines.append(
        f"| waiting for data | {found['data_seconds']:.1f} s, {100 * share:.1f} % of the steps' time |"
    )
    lines.append(f"| goodput | {100 * found['goodput']:.1f} % of {found['wall'] / 60:.1f} min |")
    lines.append("| communication not hidden | not measured |")
    lines += ["", "## Memory of one process", "", "| | MiB |", "|---|---|"]
    predicted = predicted_memory(shape, config, length, processes)
    for kind, size in predicted.items():
        lines.append(f"| {kind}, predicted | {size / 2**20:,.1f} |")
    lines.append(f"| all, predicted | {sum(predicted.values()) / 2**20:,.1f} |")
    what, size = measured_memory()
    lines.append(f"| {what} | {size / 2**20:,.1f} |")
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
