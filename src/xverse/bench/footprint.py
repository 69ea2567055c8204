"""Memory and time of a quantised model from end to end: quantising, starting, reading a long prompt.

Random weights of a named shape are written once and quantised by ``xverse quantize``; every measurement is a
fresh process that reports its own VmHWM, file pages included. Part of ``xverse bench quant``. Linux only.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xverse.bench.infer import placeholder_tokenizer
from xverse.bench.load import check_space, make_weights
from xverse.bench.report import Row, at_most
from xverse.config import UserError
from xverse.log import notice
from xverse.model import XverseConfig

TOKENS = 2048
# GB of 1e9 bytes: the promises at 7B with 2,048 tokens, for keys and values in bfloat16 and in int8
LIMITS = {"bf16": (16.2, 15.7), "int8": (9.0, 8.5), "int4": (5.3, 4.8)}
QUANTIZE_GB, QUANTIZE_S = 8.0, 300  # of `xverse quantize` with rtn at 7B
START_S = 5.0  # from the command to the first token, files in the page cache
STARTS = 3

# Runs one command of ours in a process of its own and says what it took.
COMMAND = """
import json, sys, time
start = time.perf_counter()
from xverse.cli import main
code = main(sys.argv[2:])
seconds = time.perf_counter() - start
peak = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
open(sys.argv[1], "w").write(json.dumps({"code": code, "seconds": seconds, "peak_bytes": peak}))
"""

# Reads a prompt, makes a few tokens up to TOKENS positions, reports the peak.
PROMPT = """
import json, sys, time
import torch
from xverse.engine import Engine, Request, SamplingParams
from xverse.formats import load_model, load_tokenizer
directory, kv, tokens, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
start = time.perf_counter()
model = load_model(directory)
loaded = time.perf_counter() - start
engine = Engine(model, load_tokenizer(directory), kv_dtype=kv)
ids = torch.randint(300, model.config.vocab_size, (tokens - 8,), generator=torch.Generator().manual_seed(0))
request = Request(prompt_ids=ids.tolist(), sampling=SamplingParams.greedy(8), stop_ids=())
start = time.perf_counter()
events = list(engine.stream(request))
assert len(events) == 8 and not any(event.error for event in events), events[-1]
seconds = time.perf_counter() - start
peak = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(json.dumps({"peak_bytes": peak, "load_s": loaded, "prompt_s": seconds}))
"""


def run(config: XverseConfig, directory: Path | None, threads: int) -> dict[str, Any]:
    """All measurements of one shape. ``directory``: where weights are made (None: the temporary one)."""
    if not Path("/proc/self/status").exists():
        raise UserError("bench quant reads /proc/self/status, which only Linux has")
    target = directory or Path(tempfile.gettempdir())
    if not target.is_dir():
        raise UserError(f"{target}: no such directory")
    check_space(target, 4 * config.num_parameters())
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="xverse-quant-", dir=target) as name:
        folders = {kind: Path(name) / kind for kind in LIMITS}
        notice(f"quant: making random bf16 weights in {name}")
        folders["bf16"].mkdir()
        make_weights(config, folders["bf16"], "safetensors")
        placeholder_tokenizer(config.vocab_size).save(folders["bf16"])
        for kind, bits in (("int8", "8"), ("int4", "4")):
            notice(f"quant: xverse quantize --bits {bits}")
            paths = ("--model", str(folders["bf16"]), "--out", str(folders[kind]))
            done = _command(Path(name) / "report.json", "quantize", *paths, "--bits", bits)
            size = sum(file.stat().st_size for file in folders[kind].glob("*.safetensors"))
            result[f"quantize_{kind}"] = {**done, "file_bytes": size}
        _forget(folders["bf16"])  # or every page that a start takes would have to be made room for
        for kind in ("int4", "int8"):
            result[f"start_{kind}_s"] = _starts(Path(name) / "report.json", folders[kind])
        for kind, folder in folders.items():
            for cache in ("auto", "int8"):
                notice(f"quant: {TOKENS} tokens, weights {kind}, keys and values {cache}")
                result[f"memory_{kind}_kv_{cache}"] = _prompt(folder, cache, threads)
    return result


def rows(result: dict[str, Any], shape: str) -> Iterator[Row]:
    """The table's lines; the promises are for 7B."""
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
        found = statistics.median(result[f"start_{kind}_s"])
        bound = at_most(START_S, found, "s") if promised else ""
        yield Row(f"first token after the command, {kind}", f"{found:.2f} s", bound)
    for kind, limits in LIMITS.items():
        for cache, limit in zip(("auto", "int8"), limits, strict=True):
            found = result[f"memory_{kind}_kv_{cache}"]
            peak = found["peak_bytes"] / 1e9
            yield Row(
                f"peak, {TOKENS} tokens, {kind}, KV {'bf16' if cache == 'auto' else cache}",
                f"{peak:.2f} GB",
                at_most(limit, peak, "GB") if promised else "",
            )


def _command(report: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, str(report), *arguments], stdout=subprocess.PIPE, text=True
    )
    if done.returncode or json.loads(report.read_text())["code"]:
        raise UserError(f"bench quant: xverse {' '.join(arguments)} failed (its reason stands above)")
    return json.loads(report.read_text())


def _forget(folder: Path) -> None:
    """Takes a folder's files out of the page cache."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _starts(report: Path, folder: Path) -> list[float]:
    """Seconds from the command to the end of an answer of one token, in fresh processes."""
    seconds = []
    for _ in range(1 + STARTS):  # the first one fills the page cache
        start = time.perf_counter()
        _command(report, "chat", "--model", str(folder), "--complete", "a", "--max-new-tokens", "1")
        seconds.append(round(time.perf_counter() - start, 3))
    return seconds[1:]


def _prompt(folder: Path, cache: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-c", PROMPT, str(folder), cache, str(TOKENS), str(threads)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
