"""Combinations of layouts and methods drawn at random, each against the losses of one process.

A case of pretraining draws processes, layout, optimizer, dtype, recomputation, accumulation and shape, one of
fine-tuning stage, trained weights, packing, accumulation, recomputation, optimizer, sharding and a number of
examples that fills no step. Half of the cases stop in the middle and go on under another layout or another
number of processes. One parent imports everything and forks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.train.processes import SHAPE, SHAPES, Stop, batch, finish_checkpoint, tiny_model
from xverse.bench.options import positive
from xverse.bench.report import Row, show
from xverse.config import UserError
from xverse.data.feed import Batch
from xverse.finetune.run import run_finetuning
from xverse.finetune.settings import read_settings
from xverse.formats import save_hf
from xverse.log import notice
from xverse.model import XverseForCausalLM
from xverse.tokenizer import train_tokenizer
from xverse.train import TrainConfig, fit
from xverse.train.materialise import initial_weights
from xverse.train.parallel import ALONE, World, world_of
from xverse.train.plot import read_metrics

STEPS, HALF = 4, 2
SECONDS = 120  # for a phase of a case
# Relative differences of losses that rounding explains: sums are added in another order.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
Case = dict[str, Any]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cases", type=positive, default=500, metavar="N", help="cases to draw (default: 500)"
    )
    parser.add_argument("--seed", type=int, help="seed of the cases (default: the day's number)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    seed = today() if args.seed is None else args.seed
    started = time.perf_counter()
    faults = []
    for number, case in enumerate(draw(seed, args.cases)):
        if problem := problem_of(case):
            faults.append({"case": case, "problem": problem})
            notice(f"composition: case {number}: {problem}\n  {json.dumps(case)}")
    seconds = time.perf_counter() - started
    show(
        f"composition: {args.cases} cases of seed {seed}",
        [Row("cases that differ from one process", str(len(faults)), "0"), Row("seconds", f"{seconds:.0f}")],
    )
    return {"bench": "composition", "cases": args.cases, "seed": seed, "faults": faults}


def today() -> int:
    return int(time.time() // 86400)


def draw(seed: int, count: int) -> Iterator[Case]:
    """``count`` cases, a function of ``seed``."""
    generator = random.Random(seed)
    for number in range(count):
        yield (_pretraining, _finetuning)[number % 2](generator)


# Drawing


def _pretraining(generator: random.Random) -> Case:
    """What the trainer refuses is not a fault, so layouts may be invalid."""
    batch = generator.choice([4, 8, 12])
    return {
        "kind": "pretraining",
        "shape": generator.choice(["xverse", "family"]),
        "common": {
            "batch_size": batch,
            "optimizer": generator.choice(["adamw", "muon"]),
            "dtype": generator.choice(["float32", "float32", "bfloat16"]),
            "z_loss": generator.choice([0.0, 1e-3]),
            "grad_clip": generator.choice([0.0, 0.5]),
        },
        "phases": [_layout(generator, batch) for _ in range(generator.choice([1, 2]))],
    }


def _layout(generator: random.Random, batch: int) -> dict[str, Any]:
    processes = generator.choice([1, 2, 2, 4])
    values: dict[str, Any] = {
        "activation_checkpointing": generator.choice(["none", "selective", "full"]),
        "parallel": "none",
    }
    replicas = processes
    if processes > 1:
        values["parallel"] = generator.choice(["ddp", "fsdp", "fsdp", "fsdp"])
        if values["parallel"] == "fsdp":
            for name in generator.sample(["tensor", "context", "pipeline", "replicate"], 2):
                degree = generator.choice([1, 2])
                if degree > 1 and replicas % degree == 0 and replicas > (1 if name != "replicate" else 2):
                    values[name] = degree
                    replicas //= degree if name != "replicate" else 1
    share = batch // replicas if batch % replicas == 0 else 1
    fitting = [size for size in (1, 2, 4, share) if share % size == 0]
    values["micro_batch_size"] = generator.choice(fitting)
    return {"processes": processes, "train": values}


def _finetuning(generator: random.Random) -> Case:
    rows = generator.choice([4, 8])  # of a step
    kind = generator.choice(["full", "lora", "freeze"])
    stage = generator.choice(["sft", "pt", "dpo", "rm", "grpo"])
    common: dict[str, Any] = {
        "stage": stage,
        "finetuning_type": kind,
        "gradient_checkpointing": generator.choice([True, False]),
        "bf16": generator.choice([False, False, True]),
        "max_samples": generator.choice([13, 18, 21]),
        "max_grad_norm": generator.choice([0.3, 1.0]),
    }
    if stage == "grpo":  # 16-bit probabilities would draw other replies
        common |= {"bf16": False, "num_generations": 2, "max_completion_length": 8, "max_samples": 21}
        common |= {"reward_funcs": "format", "reward_pattern": "[^a]*", "beta": generator.choice([0.0, 0.1])}
        common |= {"num_iterations": generator.choice([1, 2]), "use_dora": False}
    if stage in ("sft", "pt"):
        common["packing"] = generator.choice([True, False])
        common["group_by_length"] = not common["packing"] and generator.choice([True, False])
    if kind == "lora":
        common["use_dora"] = stage != "grpo" and generator.choice([True, False])
        if generator.random() < 0.3:
            common["loraplus_lr_ratio"] = 4.0
    elif generator.random() < 0.3:
        common["use_muon"] = True
    phases = []
    for _ in range(generator.choice([1, 2])):
        processes = generator.choice([1, 2, 4] if stage != "grpo" or rows == 8 else [1, 2])
        share = rows // processes
        batch = generator.choice([size for size in (1, 2, share) if share % size == 0])
        phase = {"processes": processes, "batch": batch, "accumulation": share // batch}
        sharded = processes > 1 and kind != "freeze" and not common.get("use_dora")
        phases.append({**phase, "fsdp": sharded and generator.choice([True, False])})
    if len({phase["fsdp"] for phase in phases}) > 1:  # checkpoints of Trainer are sharded or whole
        phases = [{**phase, "fsdp": False} for phase in phases]
    return {"kind": "finetuning", "rows": rows, "common": common, "phases": phases}


# Running


def problem_of(case: Case) -> str:
    """How a case differs from one process, or an empty string. What the program refuses in one line is no
    difference, unless one process refuses nothing."""
    with tempfile.TemporaryDirectory(prefix="xverse-composition-") as name:
        folder = Path(name)
        if case["kind"] == "pretraining":
            alone = [{"processes": 1, "train": {"parallel": "none", "activation_checkpointing": "none"}}]
            work: Callable[..., None] = _pretrain
        else:
            alone = [{"processes": 1, "batch": case["rows"], "accumulation": 1, "fsdp": False}]
            work = _finetune
            _write_inputs(folder)
        for label, phases in (("one", alone), ("other", case["phases"])):
            for place, phase in enumerate(phases):
                last = place + 1 == len(phases)
                failed = _forked(phase["processes"], work, case, phase, folder / label, last)
                if failed:
                    return "" if label == "other" and failed.startswith("UserError") else f"{label}: {failed}"
        found, expected = (_figures(folder / label) for label in ("other", "one"))
        kind = case["common"].get("dtype") or ("bfloat16" if case["common"].get("bf16") else "float32")
        if len(found) != len(expected):
            return f"{len(found)} steps instead of {len(expected)}"
        for step, pair in enumerate(zip(found, expected, strict=True)):
            for name, value, wanted in zip(("loss", "gradient norm"), *pair, strict=True):
                if not abs(value - wanted) <= TOLERANCE[kind] * max(1.0, abs(wanted)):
                    return f"step {step}: {name} {value!r} instead of {wanted!r}"
    return ""


def _figures(out: Path) -> list[tuple[float, float]]:
    """The loss and the norm of the gradient of each step."""
    records = read_metrics(out / "metrics.jsonl")
    return [(record["loss"], record.get("grad_norm", 0.0)) for record in records if "loss" in record]


def _forked(processes: int, work: Callable[..., None], *arguments: Any) -> str:
    """Run ``work`` in forked processes; what the first that failed says, or an empty string."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forked = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="xverse-errors-") as errors:
        children = [
            forked.Process(target=_child, args=(rank, processes, port, errors, work, arguments))
            for rank in range(processes)
        ]
        for child in children:
            child.start()
        limit, running = time.monotonic() + SECONDS, list(children)
        while running and not any(child.exitcode for child in children) and time.monotonic() < limit:
            multiprocessing.connection.wait([child.sentinel for child in running], timeout=1.0)
            running = [child for child in running if child.is_alive()]
        late = bool(running) and not any(child.exitcode for child in children)
        for child in running:
            child.kill()
        for child in children:
            child.join()
        texts = [file.read_text() for file in sorted(Path(errors).iterdir())]
    if texts:
        return texts[0]
    codes = [child.exitcode for child in children if child.exitcode]
    return f"no end within {SECONDS} s" if late else f"exit codes {codes}" if codes else ""


def _child(
    rank: int, processes: int, port: int, errors: str, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in values.items()}, MASTER_ADDR="127.0.0.1")
        os.environ["LOCAL_WORLD_SIZE"] = str(processes)
    log = os.open(os.devnull, os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        work(processes, *arguments)
    except BaseException as error:
        text = "".join(traceback.format_exception(error)[-3:])
        kind = "UserError" if isinstance(error, UserError) else type(error).__name__
        (Path(errors) / str(rank)).write_text(f"{kind}: {error}\n{text}")
        os._exit(1)
    os._exit(0)


def _pretrain(processes: int, case: Case, phase: dict[str, Any], out: Path, last: bool) -> None:
    config = TrainConfig(
        steps=STEPS, learning_rate=1e-3, warmup_steps=2, checkpoint_every=HALF, preflight="off",
        **{**case["common"], **phase["train"]},
    )  # fmt: skip
    shape = SHAPES[case["shape"]]

    def batch_at(first: int, stop: int) -> Batch:
        if not last and first >= config.sequences(HALF):
            raise Stop
        return batch(first, stop)

    def work(world: World) -> None:
        if world.size == 1:
            model, weights = tiny_model(shape), None
        else:
            model, weights = XverseForCausalLM.empty(shape), initial_weights(shape, seed=0)
        try:
            fit(model, batch_at, config, out, world=world, weights=weights)
        except Stop:
            finish_checkpoint()

    if processes == 1:
        work(ALONE)
    else:
        with world_of(config.parallel) as world:
            work(world)


def _write_inputs(folder: Path) -> None:
    """A tiny model and a dataset of each stage, with examples of unequal lengths."""
    texts = [f"say hello {i} good morning and again go away now" for i in range(40)]
    tokenizer = train_tokenizer(texts, vocab_size=285, min_frequency=1)
    model = tiny_model(dataclasses.replace(SHAPE, vocab_size=tokenizer.vocab_size))
    save_hf(model, tokenizer, folder / "base", torch.float32)
    replies = ["good morning" + " and again" * (i % 5) for i in range(24)]
    asked = [f"say hello {i}" for i in range(24)]
    rows = {
        "sft": [{"instruction": q, "output": a} for q, a in zip(asked, replies, strict=True)],
        "pt": [{"text": f"{q} {a}"} for q, a in zip(asked, replies, strict=True)],
        "grpo": [{"question": q} for q in asked],
        "dpo": [
            {"instruction": q, "chosen": a, "rejected": "go away now"}
            for q, a in zip(asked, replies, strict=True)
        ],
    }
    rows["rm"] = rows["dpo"]
    for stage, items in rows.items():
        (folder / f"{stage}.json").write_text(json.dumps(items))


def _finetune(processes: int, case: Case, phase: dict[str, Any], out: Path, last: bool) -> None:
    folder, common = out.parent, case["common"]
    values: dict[str, Any] = {
        **common,
        "model_name_or_path": str(folder / "base"),
        "dataset": str(folder / f"{common['stage']}.json"),
        "output_dir": str(out),
        "do_train": True,
        "use_cpu": True,
        "per_device_train_batch_size": phase["batch"],
        "gradient_accumulation_steps": phase["accumulation"],
        "max_steps": STEPS,
        "save_steps": HALF,
        "logging_steps": 1,
        "learning_rate": 2e-3,
        "cutoff_len": 48,
        "lr_scheduler_type": "constant",
    }
    if phase["fsdp"]:
        values["fsdp"] = "full_shard"
    checkpoint = out / f"checkpoint-{HALF}"
    if checkpoint.is_dir():
        values["resume_from_checkpoint"] = str(checkpoint)
    settings = read_settings(values, "composition")
    if last:
        run_finetuning(settings)
        return
    from transformers import TrainerControl, TrainerState

    from xverse.finetune.safety import StopOnSignal
    from xverse.train.survival import Interrupted

    after = StopOnSignal.on_step_end

    def stop(self: Any, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.signals.stop |= state.global_step == HALF
        after(self, args, state, control, **kwargs)

    StopOnSignal.on_step_end = stop  # type: ignore[method-assign]  # as a signal after this step would
    try:
        run_finetuning(settings)
    except Interrupted:
        return


if __name__ == "__main__":  # SEED COUNT, or the cases as JSON: one line of JSON with the faults
    drawn = json.loads(sys.argv[1]) if len(sys.argv) == 2 else draw(int(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps([[case, problem] for case in drawn if (problem := problem_of(case))]))
