"""``command.py REPORT THREADS ARGUMENTS…``: run ``xverse ARGUMENTS``.

Writes the exit code, seconds and peak memory to REPORT as JSON. THREADS 0: PyTorch's default.
"""

import json
import sys
import time
from pathlib import Path

start = time.perf_counter()
from xverse.cli import main  # noqa: E402 - its import counts


def run(report: str, threads: int, arguments: list[str]) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)
    code = main(arguments)
    seconds = time.perf_counter() - start
    from xverse.hardware import process_memory

    figures = {"code": code, "seconds": seconds, "peak_bytes": process_memory("VmHWM")}
    Path(report).write_text(json.dumps(figures))


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
