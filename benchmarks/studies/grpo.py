"""GRPO beside trl's GRPOTrainer: steps of equal weights on equal prompts, each side in its own process.

Weights are random, so nearly every reply has ``--new-tokens``; the reward is the share of even token ids. A
step is generation, rewards and training; figures are medians over rounds, without each run's first step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies.common import ROOT, module
from xverse import hardware
from xverse.bench.options import add_rounds, add_threads, positive
from xverse.bench.report import Row, at_least, count_threads, show
from xverse.config import UserError, need
from xverse.log import notice
from xverse.model import XverseForCausalLM, init_weights, named_shape

TARGET = 4.0
SIDES = ("xverse", "trl")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", default="nano", metavar="S", help="a named shape of nano's vocabulary")
    parser.add_argument("--generations", type=positive, default=8, metavar="N", help="replies to a prompt")
    parser.add_argument("--prompts", type=positive, default=4, metavar="N", help="prompts of a step")
    parser.add_argument("--prompt-words", type=positive, default=48, metavar="N", help="words of a prompt")
    parser.add_argument("--new-tokens", type=positive, default=64, metavar="N", help="tokens of a reply")
    parser.add_argument("--steps", type=positive, default=3, metavar="N", help="steps of each run")
    add_rounds(parser, 3)
    add_threads(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from xverse.formats import load_tokenizer, resolve, save_hf, save_llama

    if args.steps < 2:
        raise UserError("steps: use at least 2; the first one warms up")
    need("trl", "bench", "python -m benchmarks grpo", load=False)
    threads = args.threads or hardware.cores().usable
    config, tokenizer = named_shape(args.shape), load_tokenizer(resolve("nano"))
    with tempfile.TemporaryDirectory(prefix="xverse-grpo-") as name:
        folder = Path(name)
        model = XverseForCausalLM(config)
        init_weights(model, seed=0)
        save_hf(model, tokenizer, folder / "xverse", torch.float32)
        save_llama(model, tokenizer, folder / "llama", torch.float32)
        count = args.prompts * args.steps
        words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
        rows = [
            {"prompt": f"{n}: " + " ".join(words[(n * k) % 10] for k in range(args.prompt_words))}
            for n in range(count)
        ]
        (folder / "prompts.json").write_text(json.dumps(rows))
        job = {
            "folder": name, "generations": args.generations, "batch": args.prompts * args.generations,
            "new_tokens": args.new_tokens, "steps": args.steps, "threads": threads,
        }  # fmt: skip
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for number in range(args.rounds):
            for side in SIDES:
                notice(f"grpo: round {number + 1} of {args.rounds}, {side}")
                runs[side].append(_child({**job, "side": side}))
    speeds = {side: [some["tokens"] / some["seconds"] for some in runs[side]] for side in SIDES}
    ratio = statistics.median(a / b for a, b in zip(*speeds.values(), strict=True))
    rows_shown = [
        Row(side, f"{statistics.median(values):,.1f} reply tokens/s") for side, values in speeds.items()
    ]
    rows_shown.append(Row("xverse / trl", f"{ratio:.2f} ×", at_least(TARGET, ratio, "×")))
    show(f"grpo: {args.shape}, {job['batch']} replies a step, {count_threads(threads)}", rows_shown)
    return {"bench": "grpo", "shape": args.shape, **{k: v for k, v in job.items() if k != "folder"},
            "tokens_s": speeds, "ratio": round(ratio, 3)}  # fmt: skip


def _child(job: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(module("grpo", json.dumps(job)), capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise UserError(f"{job['side']} failed: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def even_share(completion_ids: list[list[int]], **rest: Any) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def _clock() -> tuple[Any, list[float]]:
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    return Clock(), ends


def _ours(job: dict[str, Any], clock: Any) -> float:
    """Run our side; returns the mean length of replies."""
    from xverse.finetune import build, run
    from xverse.finetune.settings import read_settings
    from xverse.train.plot import read_metrics

    made, folder = build.make_trainer, Path(job["folder"])

    def with_clock(*arguments: Any) -> Any:
        trainer = made(*arguments)
        trainer.add_callback(clock)
        return trainer

    run.make_trainer = with_clock  # type: ignore[assignment]  # the same function, with the clock
    out = Path(tempfile.mkdtemp(dir=folder))
    values = {
        "model_name_or_path": folder / "xverse", "dataset": folder / "prompts.json", "output_dir": out,
        "do_train": True, "stage": "grpo", "finetuning_type": "full", "allow_code": True,
        "reward_funcs": "benchmarks.studies.grpo:even_share", "num_generations": job["generations"],
        "max_completion_length": job["new_tokens"], "per_device_train_batch_size": job["batch"],
        "max_steps": job["steps"], "save_strategy": "no", "logging_steps": 1, "use_cpu": True,
        "overwrite_output_dir": True,
    }  # fmt: skip
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    run.run_finetuning(read_settings(plain, "grpo"))
    lengths = [record["completion_length"] for record in read_metrics(out / "metrics.jsonl")]
    return statistics.mean(lengths)


def _theirs(job: dict[str, Any], clock: Any) -> float:
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    folder = Path(job["folder"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)
    args = GRPOConfig(
        output_dir=str(folder / "trl"), num_generations=job["generations"], bf16=False,
        max_completion_length=job["new_tokens"], per_device_train_batch_size=job["batch"],
        max_steps=job["steps"], save_strategy="no", logging_steps=1, report_to="none", use_cpu=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    rows = json.loads((folder / "prompts.json").read_text())
    trainer = GRPOTrainer(
        model=LlamaForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(rows),
        reward_funcs=even_share,
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    lengths = [
        entry["completions/mean_length"]
        for entry in trainer.state.log_history
        if "completions/mean_length" in entry
    ]
    return statistics.mean(lengths)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    timer, times = _clock()
    mean = (_ours if given["side"] == "xverse" else _theirs)(given, timer)
    print(json.dumps({"seconds": times[-1] - times[0], "tokens": mean * given["batch"] * (len(times) - 1)}))
