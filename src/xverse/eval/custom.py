"""The prompts of a benchmark that the user describes in a YAML file (docs/evaluation.md shows one)."""

from __future__ import annotations

import functools
from pathlib import Path

from xverse.data.benchmarks import custom
from xverse.data.benchmarks.questions import SHOTS_TAKEN_OUT, Question
from xverse.eval.benchmark import Benchmark, lettered


def load(path: Path) -> Benchmark:
    """Raises UserError, naming the key, for an invalid description."""
    description = custom.load_description(path)

    def item(question: Question) -> str:
        passage = f"{question.passage.strip()}\n" if question.passage.strip() else ""
        return f"{passage}{question.text.strip()}{lettered(question)}\n{description.ask}"

    shots = description.shots
    return Benchmark(
        name=description.name,
        title=description.title or description.name,
        folder=description.folder or description.name,
        splits=tuple(
            dict.fromkeys((description.split, *(split for split in description.files if split != shots)))
        ),
        load=functools.partial(custom.subjects, description),
        header=lambda subject: description.header.replace("{subject}", subject.title),
        item=item,
        answer=lambda question, letter: description.letter.replace("{letter}", letter),
        average=description.average,
        shots_rule=SHOTS_TAKEN_OUT if shots is None else f"the first five of split {shots}",
        method=f"described in {path.name}, tokens of {description.letter!r}",
    )
