"""``load.py MODEL``: load a model and read every byte of its weights.

Prints memory, seconds and a checksum as JSON. The baseline is what the process holds after its imports.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from xverse.formats import (
    load_model,
    read,  # noqa: F401 - loaded lazily otherwise, and the imports belong to the baseline
)
from xverse.hardware import process_memory


def run(directory: str) -> None:
    torch.zeros(1 << 10).sum()
    baseline = process_memory("VmRSS")
    start = time.perf_counter()
    model = load_model(directory)
    loaded = time.perf_counter() - start
    checksum = 0
    for parameter in model.parameters():
        flat = parameter.detach().flatten()
        checksum ^= int(flat[: len(flat) // 4 * 4].view(torch.int64).sum())
    figures = {
        "baseline_bytes": baseline,
        "peak_bytes": process_memory("VmHWM"),
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "load_s": loaded,
        "load_and_read_s": time.perf_counter() - start,
        "checksum": checksum & (1 << 63) - 1,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    run(sys.argv[1])
