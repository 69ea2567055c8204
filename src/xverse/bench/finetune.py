"""Fine-tuning: speed and memory against transformers' and trl's trainers, QLoRA's memory, and what it learns.

``--part peers``: contenders in turn, each in a process of its own, several rounds, medians. ``--part
memory``: some steps of QLoRA on random weights of a shape. ``--part quality``: ``finetune_quality.py``.
"""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from xverse import hardware
from xverse.bench.report import Row, at_least, at_most, count_threads, need_memory, show
from xverse.bench.trainers import CONTENDERS
from xverse.config import UserError, choose
from xverse.finetune.settings import read_settings
from xverse.log import notice
from xverse.model import XverseConfig, XverseForCausalLM, init_weights, named_shape

VOCABULARY = 100_534
# ours against whose: tokens/s at least so many times, memory at most so many times
TARGETS = (("xverse", "transformers", 1.3, 0.6), ("xverse-packed", "trl", 1.1, 0.95))
QLORA_GB = 10.0
CHILD = "import sys; from xverse.bench.trainers import child; child(sys.argv[1])"


def run(
    part: str = "peers",
    *,
    data: str | None = None,
    shape: str | None = None,
    vocabulary: int | None = None,
    batch_size: int = 8,
    sequence_length: int = 512,
    steps: int = 6,
    rounds: int = 3,
    contenders: Sequence[str] | None = None,
    base: str = "nano",
    out: str | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Measure one part. Raises UserError for what is missing: data, memory, trl."""
    parts: dict[str, Callable[..., dict[str, Any]]]
    parts = {"peers": _peers, "memory": _memory, "quality": _quality}
    options = {key: value for key, value in locals().items() if key not in ("part", "parts")}
    options["threads"] = threads or hardware.cores().usable
    return choose("part", part, parts)(**options)


def _quality(
    *, data: str | None, base: str, out: str | None, steps: int, threads: int, **_: Any
) -> dict[str, Any]:
    from xverse.bench.finetune_quality import measure

    if data is None or out is None:
        raise UserError(
            "bench finetune --part quality: name the folder of instructions with --data, and --out"
        )
    return measure(Path(data).expanduser(), base, Path(out).expanduser(), steps, threads)


def _peers(
    *,
    data: str | None,
    shape: str | None,
    vocabulary: int | None,
    batch_size: int,
    sequence_length: int,
    steps: int,
    rounds: int,
    contenders: Sequence[str] | None,
    threads: int,
    **_: Any,
) -> dict[str, Any]:
    if data is None:
        raise UserError(
            "bench finetune: name a file of instructions with --data (alpaca's is what it is for)"
        )
    if steps < 2:
        raise UserError("steps: at least 2, the first of which warms up")
    sides = list(contenders or CONTENDERS)
    for side in sides:
        choose("contenders", side, {name: name for name in CONTENDERS})
    config = dataclasses.replace(named_shape(shape or "mini"), vocab_size=vocabulary or VOCABULARY)
    need_memory(16 * config.num_parameters() + 16 * batch_size * sequence_length * config.vocab_size)
    with tempfile.TemporaryDirectory(prefix="xverse-finetune-") as name:
        job = _prepare(Path(name), config, Path(data).expanduser(), sequence_length)
        job |= {"length": sequence_length, "batch_size": batch_size, "steps": steps, "threads": threads}
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for number in range(rounds):
            for side in sides:
                notice(f"finetune: round {number + 1} of {rounds}, {side}")
                found[side].append(_child({**job, "side": side}))
    result: dict[str, Any] = {
        "bench": "finetune",
        "part": "peers",
        "parameters": config.num_parameters(),
        "vocabulary": config.vocab_size,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "steps": steps,
        "rounds": rounds,
        "threads": threads,
        "contenders": {side: _summary(each) for side, each in found.items()},
    }
    result["ratios"] = _ratios(found)
    result["shape"] = shape or "mini"
    title = f"finetune: {batch_size} × {sequence_length}, V {config.vocab_size:,}, {count_threads(threads)}"
    show(title, _rows(result))
    return result


def _prepare(folder: Path, config: XverseConfig, data: Path, length: int) -> dict[str, Any]:
    """Equal weights for both kinds of model, and the examples' ids and masks."""
    from xverse.finetune.encode import load_data
    from xverse.formats import load_tokenizer, resolve, save_hf, save_llama

    tokenizer = load_tokenizer(resolve("nano"))
    model = XverseForCausalLM(config)
    init_weights(model, seed=0)
    save_hf(model, tokenizer, folder / "xverse", torch.float32)
    save_llama(model, tokenizer, folder / "llama", torch.float32)
    values = {"model_name_or_path": "nano", "dataset": str(data), "output_dir": "-", "do_train": True}
    settings = read_settings({**values, "max_samples": 4096}, "bench finetune")
    examples = load_data(settings, tokenizer, length).train
    random.Random(0).shuffle(examples)
    rows = [(example.ids, example.mask, example.name) for example in examples]
    (folder / "examples.json").write_text(json.dumps(rows))
    paths = {name: str(folder / name) for name in ("xverse", "llama", "out")}
    return {**paths, "examples": str(folder / "examples.json")}


def _child(job: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-c", CHILD, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1]
        raise UserError(f"bench finetune: {job['side']} failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _speed(found: dict[str, Any]) -> float:
    """Tokens that are no padding a second, without the first step."""
    return sum(found["tokens"][1:]) / sum(found["seconds"][1:])


def _summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    peaks = [each["peak_bytes"] for each in found if each["peak_bytes"]]
    return {
        "tokens_s": round(statistics.median(_speed(each) for each in found), 2),
        "tokens_s_rounds": [round(_speed(each), 2) for each in found],
        "tokens_a_step": round(statistics.mean(found[0]["tokens"][1:]), 1),
        "peak_gb": round(statistics.median(peaks) / 1e9, 4) if peaks else None,
        "first_loss": found[0]["losses"][0],
        "last_loss": found[0]["losses"][-1],
    }


def _ratios(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    ratios = []
    for ours, family, speed, memory in TARGETS:
        rivals = [side for side in found if side.startswith(family)]
        if ours not in found:
            continue
        for rival in rivals:
            pairs = list(zip(found[ours], found[rival], strict=True))
            ratios.append(
                {
                    "ours": ours,
                    "theirs": rival,
                    "speed": round(statistics.median(_speed(a) / _speed(b) for a, b in pairs), 4),
                    "memory": round(
                        statistics.median(a["peak_bytes"] / b["peak_bytes"] for a, b in pairs), 4
                    ),
                    "speed_target": speed,
                    "memory_target": memory,
                }
            )
    return ratios


def _rows(result: dict[str, Any]) -> Iterator[Row]:
    for side, found in result["contenders"].items():
        speed = f"{found['tokens_s']:,.1f} tokens/s, {found['tokens_a_step']:,.0f} a step"
        loss = f"loss {found['first_loss']:.3f} → {found['last_loss']:.3f}"
        yield Row(side, f"{speed}; {found['peak_gb']} GB", loss)
    promised = result["shape"] == "mini" and result["vocabulary"] == VOCABULARY
    for each in result["ratios"]:
        name = f"{each['ours']} / {each['theirs']}"
        yield Row(
            f"{name}, tokens/s",
            f"{each['speed']:.2f} ×",
            at_least(each["speed_target"], each["speed"], "×") if promised else "",
        )
        yield Row(
            f"{name}, memory",
            f"{each['memory']:.2f} ×",
            at_most(each["memory_target"], each["memory"], "×") if promised else "",
        )


def _memory(
    *, shape: str | None, out: str | None, sequence_length: int, steps: int, threads: int, **_: Any
) -> dict[str, Any]:
    """Steps of QLoRA with checkpointing on random INT4 weights, batch 1, rows full of random tokens."""
    from xverse.bench.infer import placeholder_tokenizer
    from xverse.bench.load import check_space, make_weights
    from xverse.formats.quantize import quantize_directory
    from xverse.quant.quantizer import QuantSettings

    name = shape or "7b"
    config = named_shape(name)
    place = Path(out).expanduser() if out else Path(tempfile.gettempdir())
    check_space(place, 3 * config.num_parameters())
    with tempfile.TemporaryDirectory(prefix="xverse-qlora-", dir=place) as folder:
        plain, quantised = Path(folder) / "plain", Path(folder) / "int4"
        plain.mkdir()
        notice(f"finetune: random weights of {name}, and xverse quantize --bits 4")
        make_weights(config, plain, "safetensors")
        tokenizer = placeholder_tokenizer(config.vocab_size)
        tokenizer.save(plain)
        quantize_directory(plain, quantised, tokenizer, QuantSettings(bits=4, embedding_bits=16))
        for file in plain.glob("*.safetensors"):
            file.unlink()
        draw = random.Random(0)
        words = [f" {draw.randrange(10_000):06d}" for _ in range(2 * sequence_length)]
        rows = [
            {"instruction": "".join(words[:8]).strip(), "input": "", "output": "".join(words[8:]).strip()}
        ]
        (Path(folder) / "data.json").write_text(json.dumps(rows * max(2, steps)))
        flags = {
            "model_name_or_path": quantised, "dataset": Path(folder) / "data.json", "do_train": True,
            "finetuning_type": "lora", "bf16": True, "gradient_checkpointing": True, "max_steps": steps,
            "per_device_train_batch_size": 1, "cutoff_len": sequence_length, "logging_steps": 1,
            "save_strategy": "no", "output_dir": Path(folder) / "out",
        }  # fmt: skip
        notice(f"finetune: {steps} steps of QLoRA at {sequence_length} tokens")
        found = flags_run({key: str(value) for key, value in flags.items()}, threads)
    result = {
        "bench": "finetune",
        "part": "memory",
        "model": name,
        "tokens": sequence_length,
        "steps": steps,
        "threads": threads,
        **found,
    }
    peak = found["peak_bytes"] / 1e9
    title = (
        f"QLoRA of {name} on INT4, {sequence_length} tokens, batch 1, recomputing; {count_threads(threads)}"
    )
    rows_shown = [
        Row(
            "peak memory of the process",
            f"{peak:.2f} GB",
            at_most(QLORA_GB, peak, "GB") if name == "7b" else "",
        ),
        Row("predicted", f"{found['metrics']['memory_predicted_gb']:.2f} GB"),
        Row("seconds a step", f"{found['metrics']['train_runtime'] / steps:.1f}"),
    ]
    show(title, rows_shown)
    return result


FLAGS = """
import json, sys
import torch
torch.set_num_threads(int(sys.argv[2]))
from xverse.cli import main
code = main(["finetune", *json.loads(sys.argv[1])])
from xverse.bench.report import process_memory
print(json.dumps({"code": code, "peak_bytes": process_memory("VmHWM")}))
"""


def flags_run(flags: dict[str, str], threads: int) -> dict[str, Any]:
    """``xverse finetune`` with flags in a process of its own: its peak memory and its metrics.

    Raises UserError where it fails; its reason stands above.
    """
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-c", FLAGS, json.dumps(words), str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    last = done.stdout.strip().splitlines()[-1:] or ["{}"]
    if done.returncode or json.loads(last[0]).get("code") != 0:
        raise UserError(f"bench finetune: xverse finetune --output_dir {flags['output_dir']} failed")
    metrics = json.loads((Path(flags["output_dir"]) / "all_results.json").read_text())
    return {"peak_bytes": json.loads(last[0])["peak_bytes"], "metrics": metrics}
