"""MMLU, 5-shot: our scoring compared with lm-evaluation-harness's transformers backend, in one run.

Both use the same weights, prompts and dtype.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from xverse import hardware
from xverse.bench.report import Row, at_least, show
from xverse.log import notice

TARGET = 5.0
TOLERANCE = 1e-3  # of a log-probability in float32; sums are taken in another order


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="nano", help="nano or a model directory")
    parser.add_argument("--data-dir", required=True, help="the folder with mmlu/")
    parser.add_argument("--questions", type=int, default=400, help="questions, from about eight subjects")
    parser.add_argument("--batch-size", type=int, default=16, help="batch size of the harness")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of both sides")
    parser.add_argument("--threads", type=int, help="CPU threads of both sides (default: all cores)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    import xverse  # noqa: F401 - registers the Auto classes
    from xverse.eval.backends import EngineBackend
    from xverse.eval.run import load_benchmarks
    from xverse.eval.scoring import make_prompts, score_prompts
    from xverse.formats import resolve

    threads = args.threads or hardware.cores().usable
    torch.set_num_threads(threads)
    (mmlu,) = load_benchmarks(["mmlu"], Path(args.data_dir))
    subjects, remaining = [], args.questions
    for subject in mmlu.subjects[:: max(1, len(mmlu.subjects) // 8)]:
        if remaining > 0:
            subjects.append(replace(subject, questions=subject.questions[:remaining]))
            remaining -= len(subject.questions)
    path = resolve(args.model)
    theirs = HFLM(pretrained=str(path), dtype="float32", batch_size=args.batch_size, device="cpu")
    rates: dict[str, list[float]] = {"xverse": [], "lm-evaluation-harness": []}
    for number in range(args.rounds):
        notice(f"evaluation: round {number + 1} of {args.rounds}")
        ours = EngineBackend.load(str(path), quantize=None, threads=threads)  # with an empty cache
        begin = time.perf_counter()
        prompts = [make_prompts(ours, mmlu.benchmark, subject, 5) for subject in subjects]
        results = [answer for group in prompts for answer in score_prompts(ours, group)]
        rates["xverse"].append(len(results) / (time.perf_counter() - begin))
        requests = [
            Instance("loglikelihood", {}, (item.prompt, f" {letter}"), index)
            for group in prompts
            for item in group
            for index, letter in enumerate("ABCD")
        ]
        begin = time.perf_counter()
        scored = theirs.loglikelihood(requests, disable_tqdm=True)
        rates["lm-evaluation-harness"].append(len(results) / (time.perf_counter() - begin))
    same = unsure = 0
    worst = 0.0
    for index, mine in enumerate(results):
        letters = [value for value, _ in scored[4 * index : 4 * index + 4]]
        worst = max(worst, *(abs(a - b) for a, b in zip(letters, mine.logprobs, strict=True)))
        best, second = sorted(letters, reverse=True)[:2]
        same += "ABCD"[letters.index(best)] == mine.prediction
        unsure += best - second < TOLERANCE
    ratio = statistics.median(
        a / b for a, b in zip(rates["xverse"], rates["lm-evaluation-harness"], strict=True)
    )
    result = {
        "bench": "evaluation",
        "model": args.model,
        "questions": len(results),
        "tokens_per_prompt": round(statistics.mean(len(answer.prompt.ids) for answer in results)),
        "threads": threads,
        "batch_size": args.batch_size,
        "questions_per_second": {name: [round(rate, 2) for rate in values] for name, values in rates.items()},
        "ratio": round(ratio, 2),
        "same_predictions": same,
        "within_tolerance": unsure,
        "largest_difference": worst,
    }
    show(
        f"MMLU, 5-shot, {args.model}, {len(results)} questions, {threads} threads",
        [
            *(Row(name, f"{statistics.median(values):.2f} questions/s") for name, values in rates.items()),
            Row("ratio", f"{ratio:.2f} ×", at_least(TARGET, ratio, "×")),
            Row("same prediction", f"{same} of {len(results)}", f"{unsure} are closer than {TOLERANCE:g}"),
            Row("largest difference of a log-probability", f"{worst:.2g}"),
        ],
    )
    return result
