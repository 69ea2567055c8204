"""Tasks other than multiple choice, one file each."""

from __future__ import annotations

from xverse.eval.generation import Task
from xverse.eval.tasks import gsm8k, humaneval, perplexity, skills

TASKS: dict[str, Task] = {
    "ppl": perplexity.run,
    "gsm8k": gsm8k.run,
    "humaneval": humaneval.run,
    "skills": skills.run,
}
