"""``xverse doctor``: this machine's hardware and software, and the speed measured on it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

from xverse import __version__, hardware
from xverse.bench.report import GPU_MATMUL, MATMUL
from xverse.config import DISTRIBUTION, install_command, installed_version
from xverse.device import compute_device, describe, usable_gpus

KERNELS = {"torch": "not compiled, using PyTorch's operations; reinstall xverse with a C++ compiler"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    report = examine()
    print(json.dumps(report, ensure_ascii=False) if args.json else render(report))
    return 0


def examine() -> dict[str, Any]:
    """The whole report as one JSON-ready mapping. Sizes in bytes, rates in bytes/s and FLOP/s."""
    from xverse.kernels.bfloat16 import product_name, use_fast_products
    from xverse.kernels.native import kernel_name

    use_fast_products()  # what is measured below is what models get

    cores = hardware.cores()
    device = compute_device()
    total, available = hardware.memory()
    return {
        "xverse": __version__,
        "system": platform.platform(),
        "cpu": {
            "model": hardware.cpu_model(),
            "cores": cores.usable,
            "cores_machine": cores.machine,
            "cores_affinity": cores.affinity,
            "cores_quota": cores.quota,
            "instruction_sets": hardware.instruction_sets(),
            "last_level_cache": hardware.last_level_cache(),
        },
        "kernels": kernel_name(),
        "bfloat16_products": product_name(),
        "device": str(device),
        "device_reason": describe(device),
        "memory": {"total": total, "available": available},
        "versions": versions(),
        "extras": extras(),
        "measured": {"cpu": measure_cpu(cores.usable), "gpus": measure_gpus()},
    }


# ---- what is installed ----


def versions() -> dict[str, str | None]:
    """Versions of Python and of each required package; None if it is not installed."""
    installed: dict[str, str | None] = {"python": platform.python_version()}
    for requirement in _requirements(""):
        installed[requirement.name] = installed_version(requirement.name)
    return installed


def extras() -> dict[str, dict[str, Any]]:
    """For each extra of the distribution: the packages that are missing or too old."""
    try:
        names = importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    report = {}
    for name in names:
        needed = _requirements(name)
        missing = [str(r.name) + str(r.specifier) for r in needed if not _met(r)]
        report[name] = {"packages": len(needed), "complete": not missing, "missing": missing}
    return report


def _requirements(extra: str) -> list[Any]:
    """The packages of ``extra`` ("": the core's), with other extras that it names resolved."""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or []]
    except importlib.metadata.PackageNotFoundError:
        return []
    resolved = []
    for requirement in declared:
        marker = requirement.marker
        core = marker is None or marker.evaluate({"extra": ""})
        if core != (extra == "") or not (core or (marker and marker.evaluate({"extra": extra}))):
            continue
        if requirement.name == DISTRIBUTION:
            resolved += [inner for name in sorted(requirement.extras) for inner in _requirements(name)]
        else:
            resolved.append(requirement)
    return resolved


def _met(requirement: Any) -> bool:
    version = installed_version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


# ---- what is measured ----


def measure_cpu(threads: int) -> dict[str, Any]:
    """Memory read rates with 1 and with ``threads`` threads, each sampled twice in turn, and matmul rates."""
    import torch

    counts = sorted({1, threads})
    samples: dict[int, list[float]] = {count: [] for count in counts}
    buffer = hardware.bandwidth_buffer()
    for _ in range(2):
        for count in counts:
            samples[count].append(hardware.read_bandwidth(buffer, count))
    size = buffer.numel() * buffer.element_size()
    del buffer
    kinds = ("float32", "bfloat16")
    with hardware.using_threads(threads):
        flops = {name: hardware.matmul_flops(getattr(torch, name), *MATMUL) for name in kinds}
    return {
        "bandwidth": [{"threads": count, "samples": pair} for count, pair in samples.items()],
        "bandwidth_buffer": size,
        "matmul_shape": list(MATMUL),
        "matmul_threads": threads,
        "matmul": flops,
    }


def measure_gpus() -> list[dict[str, Any]]:
    """For each CUDA device that PyTorch can use: its properties, measurements, and known peaks."""
    import torch

    gpus = []
    for index in usable_gpus():
        properties = torch.cuda.get_device_properties(index)
        device = f"cuda:{index}"
        with torch.cuda.device(index):
            buffer = hardware.bandwidth_buffer(device)
            bandwidth = [hardware.read_bandwidth(buffer, seconds=0.2) for _ in range(2)]
            del buffer
            flops = hardware.matmul_flops(torch.bfloat16, *GPU_MATMUL, device=device)
            torch.cuda.empty_cache()
        peaks = hardware.device_peaks(properties.name)
        gpus.append(
            {
                "name": properties.name,
                "memory": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "bandwidth_samples": bandwidth,
                "matmul_shape": list(GPU_MATMUL),
                "matmul": {"bfloat16": flops},
                "peak_bandwidth": peaks.bandwidth if peaks else None,
                "peak_bf16_flops": peaks.bf16_flops if peaks else None,
            }
        )
    return gpus


# ---- how it is printed ----


def render(report: dict[str, Any]) -> str:
    """The report as text, one fact per line."""
    cpu, memory, measured = report["cpu"], report["memory"], report["measured"]["cpu"]
    quota = f", quota {cpu['cores_quota']:g}" if cpu["cores_quota"] else ""
    free = "" if memory["available"] is None else f", {memory['available'] / 2**30:.1f} GiB available"
    lines = [
        f"xverse {report['xverse']} · {report['system']}",
        "",
        f"CPU            {cpu['model']}",
        f"cores          {cpu['cores']} usable ({cpu['cores_machine']} in the machine, "
        f"{cpu['cores_affinity']} by affinity{quota})",
        f"instructions   {' '.join(cpu['instruction_sets']) or 'unknown on this system'}",
        f"kernels        {KERNELS.get(report['kernels'], report['kernels'])}",
        f"bfloat16       products {report['bfloat16_products']}",
        f"memory         {memory['total'] / 2**30:.1f} GiB{free}",
    ]
    for gpu in report["measured"]["gpus"]:
        lines.append(
            f"GPU            {gpu['name']}, {gpu['memory'] / 2**30:.0f} GiB, compute {gpu['capability']}"
        )
    lines.append(f"device         {report['device_reason']}")

    lines += ["", "versions"]
    lines += [f"  {name:<18} {version or 'not installed'}" for name, version in report["versions"].items()]
    lines += ["", "extras"]
    for name, extra in report["extras"].items():
        state = "complete" if extra["packages"] else "needs no packages"
        if extra["missing"]:
            state = f"missing {', '.join(extra['missing'])}: {install_command(name)}"
        lines.append(f"  {name:<18} {state}")

    lines += ["", f"memory read (sum over {measured['bandwidth_buffer'] / 2**20:.0f} MiB, sampled twice)"]
    for row in measured["bandwidth"]:
        first, second = row["samples"]
        lines.append(f"  {_threads(row['threads']):<18} {first / 1e9:.1f} and {second / 1e9:.1f} GB/s")
    shape = _shape(measured["matmul_shape"])
    lines.append(f"matmul {shape}, {_threads(measured['matmul_threads'])}")
    lines += [f"  {name:<18} {_flops(value)}" for name, value in measured["matmul"].items()]
    for index, gpu in enumerate(report["measured"]["gpus"]):
        first, second = gpu["bandwidth_samples"]
        read_share = hardware.share(max(first, second), gpu["peak_bandwidth"])
        flops = gpu["matmul"]["bfloat16"]
        flops_share = hardware.share(flops, gpu["peak_bf16_flops"])
        lines += [
            f"GPU {index}: share of the vendor's peak in brackets",
            f"  {'memory read':<18} {first / 1e9:.0f} and {second / 1e9:.0f} GB/s ({read_share})",
            f"  {'bfloat16':<18} {_flops(flops)} ({flops_share}), matmul {_shape(gpu['matmul_shape'])}",
        ]
    return "\n".join(lines)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def _flops(value: float) -> str:
    return f"{value / 1e12:.1f} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.1f} GFLOP/s"
