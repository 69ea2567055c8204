"""Time and memory of planning very many documents with generated keys: copies, fates, held-out ones."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies.common import add_directory
from xverse.bench.options import positive

GROUP = 1_000_000  # documents of a group of files
COPIES = 0.1  # share of documents that are copies of others
REPEATED = 1 << 20  # different texts among the copies


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--documents", type=positive, default=10_000_000, metavar="N", help="documents to plan"
    )
    add_directory(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    return measure(**vars(args))


def measure(documents: int = 10_000_000, directory: str | None = None) -> dict[str, Any]:
    """Seconds of processor time of the phases ``copies`` and ``plan`` in one process, and its peak memory."""
    from xverse.data.prepare.plan import FindCopies, Gathered, MakePlan, SplitPlan
    from xverse.hardware import process_memory

    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        work = Path(temporary)
        counts = write_keys(work / "clean", documents)
        sources = [(name, name, "text") for name in ("a", "b", "c")]
        Gathered(counts, sources, [[0, 1, 2]] * len(counts)).save(work)
        before, start = process_memory("VmHWM") or 0, time.process_time()
        FindCopies(work, None)(None, 0, 1)
        copies, start = time.process_time() - start, time.process_time()
        MakePlan(work, 0.01, 100_000, [])(None, 0, 1)
        planned = time.process_time() - start
        plan = SplitPlan.load(work / "plan.json")
    peak = process_memory("VmHWM") or 0
    return {
        "bench": "documents",
        "documents": documents,
        "copies_found": plan.exact,
        "held_out": sum(len(source.valid) for source in plan.sources.values()),
        "copies_s": round(copies, 2),
        "plan_s": round(planned, 2),
        "peak_mb": round(peak / 1e6),
        "bytes_a_document": round((peak - before) / documents, 1),
    }


def write_keys(folder: Path, documents: int) -> np.ndarray:
    """Generated keys in the form of ``xverse.data.prepare.keys``; returns the documents of each group."""
    from xverse.data.prepare.keys import BLOCK, KEY, KeyWriter

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    repeated = rng.integers(0, 2**64, REPEATED, np.uint64)
    counts = np.diff([*range(0, documents, GROUP), documents])
    for group, count in enumerate(counts.tolist()):
        rows = np.zeros(count, KEY)
        copies = rng.random(count) < COPIES
        texts = rng.integers(0, 2**64, count, np.uint64)
        texts[copies] = repeated[rng.integers(0, REPEATED, int(copies.sum()))]
        rows["text"], rows["source"] = texts, texts % np.uint64(3)
        rows["bytes"] = rng.integers(50, 5_000, count)
        with KeyWriter(folder / f"{group:05d}", near=False) as writer:
            for start in range(0, count, BLOCK):
                writer.write(rows[start : start + BLOCK])
    return counts
