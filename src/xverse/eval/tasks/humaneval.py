"""HumanEval (Chen et al., arXiv:2107.03374): functions that the model writes, run against their tests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from xverse import hardware
from xverse.config import UserError
from xverse.data.benchmarks import humaneval
from xverse.data.benchmarks.humaneval import Problem
from xverse.eval.generation import Outcome, TaskRun, encode_prompts, generate
from xverse.eval.sandbox import run_python

STOPS = ["\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\nassert "]  # the function has ended
SECONDS = 10.0


def run(task: TaskRun) -> Outcome:
    if not task.settings.allow_code:
        raise UserError(
            "humaneval runs code that the model writes, in a process without network and with limited memory "
            "and time; pass --allow-code to permit it"
        )
    path = task.data_dir / "humaneval" / "HumanEval.jsonl.gz"
    problems = [problem for _, problem in humaneval.read(path)][: task.settings.limit]
    engine, stop_ids, progress = task.engine, task.stop_ids, task.progress
    prompts = encode_prompts(engine, [problem.prompt for problem in problems])
    replies = generate(engine, prompts, max_new_tokens=400, stop_ids=stop_ids, stop=STOPS, progress=progress)
    code = [text for text, _ in replies]
    with ThreadPoolExecutor(hardware.cores().usable) as pool:
        results = list(
            pool.map(
                lambda pair: run_python(program(pair[0], pair[1]), SECONDS), zip(problems, code, strict=True)
            )
        )
    rows: list[dict[str, Any]] = [
        {
            "task": "humaneval",
            "id": problem.task_id,
            "prompt": problem.prompt,
            "reply": text,
            "passed": result.ok,
            "stderr": result.stderr[-500:],
        }
        for problem, text, result in zip(problems, code, results, strict=True)
    ]
    return Outcome(
        title="HumanEval",
        method="pass@1 of the likeliest text, zero-shot",
        figures={"pass@1, %": 100 * sum(row["passed"] for row in rows) / len(rows), "problems": len(rows)},
        rows=rows,
    )


def program(problem: Problem, code: str) -> str:
    """The function with its tests: it exits without an error if all of them pass."""
    return f"{problem.prompt}{code}\n\n{problem.test}\n\ncheck({problem.entry_point})\n"
