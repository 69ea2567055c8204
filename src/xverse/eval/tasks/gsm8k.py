"""GSM8K (Cobbe et al., arXiv:2110.14168): the number at the end of a worked solution."""

from __future__ import annotations

import re

from xverse.config import UserError
from xverse.data.benchmarks import gsm8k
from xverse.data.benchmarks.questions import QuestionReader
from xverse.eval.generation import Outcome, TaskRun, encode_prompts, generate
from xverse.eval.replies import last_number

SHOTS = 5
_CALCULATION = re.compile(r"<<.*?>>")  # calculator annotations, which repeat the text


def run(task: TaskRun) -> Outcome:
    path = task.data_dir / "gsm8k" / "test.jsonl"
    rows = [
        (raw.where, raw.text, _CALCULATION.sub("", str(raw.answer)))
        for raw in gsm8k.read(path, "test", QuestionReader())
    ]
    if len(rows) <= SHOTS:
        raise UserError(f"{path.parent}: {len(rows)} questions are too few (more than 5 are needed)")
    shots = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for _, question, answer in rows[:SHOTS])
    scored = rows[SHOTS:][: task.settings.limit]
    prompts = [f"{shots}Question: {question}\nAnswer:" for _, question, _ in scored]
    replies = generate(
        task.engine,
        encode_prompts(task.engine, prompts),
        max_new_tokens=400,
        stop_ids=task.stop_ids,
        stop=["\n\n", "Question:"],
        progress=task.progress,
    )
    results = [
        {
            "task": "gsm8k",
            "id": where.rpartition(" ")[2],
            "prompt": prompt,
            "reply": reply,
            "prediction": last_number(reply),
            "answer": last_number(answer),
        }
        for (where, _, answer), prompt, (reply, _) in zip(scored, prompts, replies, strict=True)
    ]
    right = sum(row["prediction"] == row["answer"] for row in results)
    return Outcome(
        title="GSM8K",
        method=f"{SHOTS}-shot, the likeliest text, its number behind #### or else its last one; the shots "
        "are the first questions of the test set and not scored",
        figures={"exact match, %": 100 * right / len(results), "questions": len(results)},
        rows=results,
    )
