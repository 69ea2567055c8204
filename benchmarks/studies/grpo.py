"""GRPO against trl's GRPOTrainer: steps of equal weights on equal prompts, each side in its own process.

By default the embedded chat model answers sums, and the right number is the reward; with ``--shape`` weights
are random, nearly every reply has ``--new-tokens``, and the reward is the share of even token ids. A step is
generation, rewards and training. Figures are medians over rounds, without each run's first step, in processor
time, which other programs change less than the time that passes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies.common import ROOT, module
from xverse import hardware, values
from xverse.bench.options import add_rounds, add_threads, positive
from xverse.bench.report import Row, at_least, count_threads, show
from xverse.config import UserError, need
from xverse.log import notice
from xverse.model import XverseForCausalLM, init_weights, named_shape
from xverse.tokenizer import encode_chat

TARGET = 4.0
SIDES = ("xverse", "trl")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", metavar="S", help="random weights of a named shape of nano's vocabulary")
    parser.add_argument("--generations", type=positive, default=8, metavar="N", help="replies to a prompt")
    parser.add_argument("--prompts", type=positive, default=8, metavar="N", help="prompts of a step")
    parser.add_argument("--prompt-words", type=positive, default=48, metavar="N", help="words of a prompt")
    parser.add_argument(
        "--new-tokens", type=positive, default=256, metavar="N", help="most tokens of a reply"
    )
    parser.add_argument("--steps", type=positive, default=3, metavar="N", help="steps of each run")
    parser.add_argument(
        "--learning-rate", type=values.positive(1), default=1e-5, metavar="X", help="a constant one"
    )
    add_rounds(parser, 3)
    add_threads(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from xverse.formats import load_model, load_tokenizer, resolve, save_hf, save_llama

    if args.steps < 2:
        raise UserError("steps: use at least 2; the first one warms up")
    if args.shape is None:
        values.refuse_unused(args, "--shape", prompt_words=48)
    need("trl", "bench", "python -m benchmarks grpo", load=False)
    threads = args.threads or hardware.cores().usable
    tokenizer = load_tokenizer(resolve("nano"))
    with tempfile.TemporaryDirectory(prefix="xverse-grpo-") as name:
        folder = Path(name)
        if args.shape:
            model = XverseForCausalLM(named_shape(args.shape))
            init_weights(model, seed=0)
        else:
            model = load_model(resolve("nano"), dtype=torch.float32)
        save_hf(model, tokenizer, folder / "xverse", torch.float32)
        save_llama(model, tokenizer, folder / "llama", torch.float32)
        rows = list(_rows(args.prompts * args.steps, args.prompt_words if args.shape else 0))
        for row in rows:
            row["ids"] = encode_chat(
                tokenizer, [{"role": "user", "content": row["prompt"]}], max_new_tokens=args.new_tokens
            ).ids
        (folder / "prompts.json").write_text(json.dumps(rows))
        job = {
            "folder": name, "generations": args.generations, "batch": args.prompts * args.generations,
            "new_tokens": args.new_tokens, "steps": args.steps, "threads": threads,
            "reward": "even_share" if args.shape else "right_number", "learning_rate": args.learning_rate,
        }  # fmt: skip
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for number in range(args.rounds):
            for side in SIDES:
                notice(f"grpo: round {number + 1} of {args.rounds}, {side}")
                runs[side].append(_child({**job, "side": side}))
    speeds = {side: [some["tokens"] / some["seconds"] for some in runs[side]] for side in SIDES}
    ratio = statistics.median(a / b for a, b in zip(*speeds.values(), strict=True))
    shown = [
        Row(
            side,
            f"{statistics.median(values):,.1f} reply tokens per processor second; rewards "
            + ", ".join(f"{value:.3f}" for value in runs[side][0]["rewards"]),
        )
        for side, values in speeds.items()
    ]
    shown.append(Row("xverse / trl", f"{ratio:.2f} ×", at_least(TARGET, ratio, "×")))
    what = args.shape or "nano's weights"
    show(f"grpo: {what}, {job['batch']} replies a step, {count_threads(threads)}", shown)
    return {"bench": "grpo", "shape": args.shape, **{k: v for k, v in job.items() if k != "folder"},
            "tokens_s": speeds, "runs": runs, "ratio": round(ratio, 3)}  # fmt: skip


def _rows(count: int, words: int) -> Iterator[dict[str, Any]]:
    """Prompts of ``words`` random words; 0: sums in words or figures, with answers."""
    draw = random.Random(0)
    for number in range(count):
        if words:
            listed = " ".join(draw.choice(["one", "two", "three", "four", "five"]) for _ in range(words))
            yield {"prompt": f"{number}: {listed}", "answer": ""}
            continue
        a, b, c = draw.randrange(10, 99), draw.randrange(2, 99), draw.randrange(2, 9)
        text, answer = draw.choice([
            (f"What is {a} + {b}?", a + b),
            (f"Tom has {a} apples and buys {b} more. He gives {c} to Ann. How many has he now?", a + b - c),
            (f"Solve {c} * {a} - {c}. Show your steps.", c * a - c),
            (f"A box holds {c} pens. How many pens are in {b} boxes?", b * c),
        ])  # fmt: skip
        yield {"prompt": text, "answer": str(answer)}


def _child(job: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(module("grpo", json.dumps(job)), capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise UserError(f"{job['side']} failed: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def even_share(completion_ids: list[list[int]], **rest: Any) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def right_number(completions: list[str], answer: list[str], **rest: Any) -> list[float]:
    from xverse.eval.replies import wrong_number

    return [float(wrong_number(text, right) is None) for text, right in zip(completions, answer, strict=True)]


def _clock() -> tuple[Any, list[float]]:
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(sum(os.times()[:4]))  # of this process and its children

    return Clock(), ends


def _ours(job: dict[str, Any], clock: Any) -> list[dict[str, float]]:
    """Run our side; returns the mean length of replies and the mean reward of each step."""
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
        "reward_funcs": f"benchmarks.studies.grpo:{job['reward']}", "num_generations": job["generations"],
        "max_completion_length": job["new_tokens"], "per_device_train_batch_size": job["batch"],
        "max_steps": job["steps"], "save_strategy": "no", "logging_steps": 1, "use_cpu": True,
        "overwrite_output_dir": True, "learning_rate": job["learning_rate"], "lr_scheduler_type": "constant",
    }  # fmt: skip
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    run.run_finetuning(read_settings(plain, "grpo"))
    return [
        {"length": record["completion_length"], "reward": record["reward"]}
        for record in read_metrics(out / "metrics.jsonl")
    ]


def _theirs(job: dict[str, Any], clock: Any) -> list[dict[str, float]]:
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
        gradient_checkpointing=False, learning_rate=job["learning_rate"], lr_scheduler_type="constant",
    )  # fmt: skip
    rows = json.loads((folder / "prompts.json").read_text())
    ids = {row["prompt"]: row.pop("ids") for row in rows}

    class Trainer(GRPOTrainer):
        def _tokenize_prompts(self, prompts: list[str]) -> Any:  # equal ids: those of our template
            return [ids[prompt] for prompt in prompts], None, {}

    trainer = Trainer(
        model=LlamaForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(rows),
        reward_funcs=globals()[job["reward"]],
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    return [
        {"length": entry["completions/mean_length"], "reward": entry["reward"]}
        for entry in trainer.state.log_history
        if "completions/mean_length" in entry
    ]


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    timer, times = _clock()
    steps = (_ours if given["side"] == "xverse" else _theirs)(given, timer)
    tokens = sum(step["length"] for step in steps[1:]) * given["batch"]
    rewards = [round(step["reward"], 4) for step in steps]
    print(json.dumps({"seconds": times[-1] - times[0], "tokens": tokens, "rewards": rewards}))
