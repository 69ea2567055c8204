"""Memory and time of a quantised model from end to end: quantising, starting, prefilling a long prompt.

Random weights of a named shape are written once and quantised by ``xverse quantize``; every measurement is a
fresh process that reports its VmHWM, file pages included. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.studies.common import (
    ROOT,
    add_directory,
    check_space,
    existing,
    make_weights,
    module,
    need_proc,
    run_xverse,
)
from xverse import hardware
from xverse.bench.options import add_shape, add_threads
from xverse.bench.report import Row, at_most, show
from xverse.bench.weights import placeholder_tokenizer
from xverse.config import choose
from xverse.log import notice
from xverse.model import SHAPES, XverseConfig

TOKENS = 2048
# Targets at 7B with 2,048 tokens, in GB, for keys and values in bfloat16 and in int8
LIMITS = {"bf16": (16.2, 15.7), "int8": (9.0, 8.5), "int4": (5.3, 4.8)}
QUANTIZE_GB, QUANTIZE_S = 8.0, 300  # targets of `xverse quantize` with rtn at 7B
START_S = 5.0  # from the command to the first token, files in the page cache
STARTS = 3


def arguments(parser: argparse.ArgumentParser) -> None:
    add_shape(parser, "7b")
    add_threads(parser)
    add_directory(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    config = choose("shape", args.shape, SHAPES)
    threads = args.threads or hardware.cores().usable
    result = measure(config, args.directory, threads)
    show(f"footprint of {args.shape}: memory and time", rows(result, args.shape))
    return {"bench": "footprint", "shape": args.shape, "threads": threads, **result}


def measure(config: XverseConfig, directory: str | None, threads: int) -> dict[str, Any]:
    """All measurements of one shape. ``directory``: for the weights (None: the temporary one)."""
    need_proc()
    target = existing(directory)
    check_space(target, 4 * config.num_parameters())
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="xverse-footprint-", dir=target) as name:
        folders = {kind: Path(name) / kind for kind in LIMITS}
        notice(f"footprint: generating random bf16 weights in {name}")
        folders["bf16"].mkdir()
        make_weights(config, folders["bf16"], "safetensors")
        placeholder_tokenizer(config.vocab_size).save(folders["bf16"])
        for kind, bits in (("int8", "8"), ("int4", "4")):
            notice(f"footprint: xverse quantize --bits {bits}")
            paths = ("--model", str(folders["bf16"]), "--out", str(folders[kind]))
            done = run_xverse(["quantize", *paths, "--bits", bits, "--method", "rtn"])
            del done["stderr"]
            size = sum(file.stat().st_size for file in folders[kind].glob("*.safetensors"))
            result[f"quantize_{kind}"] = {**done, "file_bytes": size}
        _forget(folders["bf16"])  # otherwise each start would have to evict its pages first
        for kind in ("int4", "int8"):
            result[f"start_{kind}_s"] = _starts(folders[kind])
        for kind, folder in folders.items():
            for cache in ("auto", "int8"):
                notice(f"footprint: {TOKENS} tokens, weights {kind}, keys and values {cache}")
                result[f"memory_{kind}_kv_{cache}"] = _prompt(folder, cache, threads)
    return result


def rows(result: dict[str, Any], shape: str) -> Iterator[Row]:
    """The lines of the table; the targets are for 7B."""
    promised = shape == "7b"
    for kind in ("int8", "int4"):
        done = result[f"quantize_{kind}"]
        peak, seconds = done["peak_bytes"] / 1e9, done["seconds"]
        yield Row(
            f"quantise to {kind} (rtn)",
            f"{seconds:.0f} s, peak {peak:.2f} GB, files {done['file_bytes'] / 1e9:.2f} GB",
            f"{at_most(QUANTIZE_S, seconds, 's')}; {at_most(QUANTIZE_GB, peak, 'GB')}" if promised else "",
        )
    for kind in ("int4", "int8"):
        seconds = statistics.median(result[f"start_{kind}_s"])
        bound = at_most(START_S, seconds, "s") if promised else ""
        yield Row(f"first token after the command, {kind}", f"{seconds:.2f} s", bound)
    for kind, limits in LIMITS.items():
        for cache, limit in zip(("auto", "int8"), limits, strict=True):
            figures = result[f"memory_{kind}_kv_{cache}"]
            peak = figures["peak_bytes"] / 1e9
            yield Row(
                f"peak, {TOKENS} tokens, {kind}, KV {'bf16' if cache == 'auto' else cache}",
                f"{peak:.2f} GB",
                at_most(limit, peak, "GB") if promised else "",
            )


def _forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _starts(folder: Path) -> list[float]:
    """Seconds from the command to the end of a reply of one token, in fresh processes."""
    seconds = []
    for _ in range(1 + STARTS):  # the first one warms the page cache
        start = time.perf_counter()
        run_xverse(["chat", "--model", str(folder), "--complete", "a", "--max-new-tokens", "1"])
        seconds.append(round(time.perf_counter() - start, 3))
    return seconds[1:]


def _prompt(folder: Path, cache: str, threads: int) -> dict[str, Any]:
    command = module("workers.prompt", str(folder), cache, str(TOKENS), str(threads))
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout)
