"""Memory while loading: peak resident set above the process's baseline, against the size of the weights.

Makes random bfloat16 weights of a named shape in a temporary directory, loads them in a fresh process, reads
every byte of every parameter, and reports VmHWM − baseline for safetensors and for ``.bin``. Linux only.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xverse.bench.report import Row, at_most, in_gb, need_memory, say_gb, show
from xverse.config import UserError, choose
from xverse.log import notice
from xverse.model import SHAPES, XverseConfig, XverseForCausalLM

SHARD_BYTES = 2 * 10**9
LIMIT = 1.05  # the promise: peak RSS above the baseline, in units of the weights ...
PROMISED = "7b"  # ... of this shape; beside a small model the code that loads it weighs
FORMATS = ("safetensors", "bin")

# The child measures itself: baseline after the imports, then the load, then a pass over all weights.
CHILD = """
import json, sys, time
import torch
from xverse.formats import load_model
from xverse.formats import read  # the imports belong to the baseline
def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024
torch.zeros(1 << 10).sum()
baseline = status("VmRSS")
start = time.perf_counter()
model = load_model(sys.argv[1])
loaded = time.perf_counter() - start
checksum = 0
for parameter in model.parameters():
    flat = parameter.detach().flatten()
    checksum ^= int(flat[: len(flat) // 4 * 4].view(torch.int64).sum())
print(json.dumps({
    "baseline_bytes": baseline,
    "peak_bytes": status("VmHWM"),
    "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    "load_s": loaded,
    "load_and_read_s": time.perf_counter() - start,
    "checksum": checksum & (1 << 63) - 1,
}))
"""


def run(shape: str = "7b", directory: str | Path | None = None) -> dict[str, Any]:
    """Measure both formats. ``directory`` is where the weights are made (None: the system's temporary one).

    Raises UserError for an unknown shape, a missing directory, too little disk space or memory, or a system
    without /proc.
    """
    config = choose("shape", shape, SHAPES)
    if not Path("/proc/self/status").exists():
        raise UserError("bench load reads /proc/self/status, which only Linux has")
    target = Path(directory or tempfile.gettempdir()).expanduser()
    if not target.is_dir():
        raise UserError(f"{target}: no such directory")
    size = 2 * config.num_parameters()
    need_memory(LIMIT * size)  # with less, pages leave again and the peak says nothing
    result: dict[str, Any] = {"bench": "load", "shape": shape, "limit": LIMIT}
    rows = []
    checksums = set()
    for kind in FORMATS:  # one after the other: the disk holds the weights once
        check_space(target, size)
        with tempfile.TemporaryDirectory(prefix="xverse-load-", dir=target) as name:
            notice(f"load {shape}: making {size / 1e9:.2f} GB of {kind} weights in {name}")
            try:
                make_weights(config, Path(name), kind)
            except OSError as error:
                raise UserError(f"{name}: the weights could not be written: {error.strerror}") from error
            found = _measure(Path(name))
        checksums.add(found.pop("checksum"))
        above = found["peak_bytes"] - found["baseline_bytes"]
        found["ratio"] = round(above / found["weight_bytes"], 4)
        result[kind] = found
        limit = f"the target of {LIMIT} × is for {PROMISED}"
        if shape == PROMISED:
            limit = at_most(LIMIT, found["ratio"], "× the weights")
        rows.append(Row(kind, f"{say_gb(in_gb(above))} = {found['ratio']:.3f} × the weights", limit))
        seconds = f"{found['load_s']:.2f} s, {found['load_and_read_s']:.2f} s with reading every byte"
        rows.append(Row("  time to load", seconds))
    assert len(checksums) == 1, "the two formats gave different weights"
    result["passed"] = all(result[kind]["ratio"] <= LIMIT for kind in FORMATS)
    show(f"load {shape}: peak RSS above the process's baseline", rows)
    return result


def check_space(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < size * 1.02:
        raise UserError(
            f"needs {size * 1.02 / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free in {directory}; "
            "--directory names another place"
        )


def _measure(directory: Path) -> dict[str, Any]:
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(directory)], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(child.stdout)


def make_weights(config: XverseConfig, directory: Path, kind: str) -> None:
    """A model directory without tokenizer: random bfloat16 weights, sharded as upstream's, ``bin`` with the
    ``inv_freq`` buffers that upstream's files hold. Needs the memory of one tensor, or of one ``.bin`` shard.
    """
    import torch

    from xverse.formats.weights import SafetensorsWriter

    with torch.device("meta"):
        shapes = {name: p.shape for name, p in XverseForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    block = torch.empty(1 << 20, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)

    def random(name: str, number: int) -> torch.Tensor:
        size = shapes[name].numel()
        rolled = block.roll(
            number * 7919
        )  # a different beginning for each tensor; values need only be finite
        return rolled.repeat(-(-size // len(block)))[:size].clone().view(shapes[name])

    (directory / "config.json").write_text(json.dumps(config.to_json()))
    if kind == "safetensors":
        writer = SafetensorsWriter(directory, len(shapes), SHARD_BYTES)
        for number, name in enumerate(shapes):
            writer.add(name, random(name, number))
        writer.close()
        return
    numbers = {name: number for number, name in enumerate(shapes)}
    shards = list(_shards({name: shape.numel() * 2 for name, shape in shapes.items()}))
    weight_map = {}
    for index, names in enumerate(shards, 1):
        file = f"pytorch_model-{index:05d}-of-{len(shards):05d}.bin"
        weight_map.update(dict.fromkeys(names, file))
        state = {name: random(name, numbers[name]) for name in names}
        for name in [name for name in names if name.endswith("self_attn.q_proj.weight")]:
            buffer = name.replace("q_proj.weight", "rotary_emb.inv_freq")
            state[buffer] = torch.ones(config.head_dim // 2)
            weight_map[buffer] = file
        torch.save(state, directory / file)
    index_text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "pytorch_model.bin.index.json").write_text(index_text)


def _shards(sizes: dict[str, int]) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if names and filled + size > SHARD_BYTES:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names
