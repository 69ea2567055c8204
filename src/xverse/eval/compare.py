"""Two evaluations on the questions that both answered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from xverse.config import UserError
from xverse.eval import report
from xverse.eval.statistics import paired

SIGNIFICANT = 0.05


def lines(first: Path, second: Path) -> Iterator[str]:
    """A Markdown table. Raises UserError where they have no question in common, or not the same prompts."""
    one, other = report.read(first), report.read(second)
    tasks = [task for task in one.answers if task in other.answers]
    if not tasks:
        raise UserError(f"{first} and {second} have no task in common")
    only = f"only {one.name} | only {other.name}"
    yield f"| task | {one.name} | {other.name} | difference (95 %) | {only} | p |"
    yield "|---|:---:|:---:|:---:|:---:|:---:|:---:|"
    for task in tasks:
        pairs = []
        theirs = {(row["subject"], row["id"]): row for rows in other.answers[task].values() for row in rows}
        for rows in one.answers[task].values():
            for row in rows:
                mate = theirs.get((row["subject"], row["id"]))
                if mate is None or row["answer"] is None:
                    continue
                if mate["prompt"] != row["prompt"]:
                    raise UserError(
                        f"{task}, {row['id']}: the prompts differ ({row['shots']} and {mate['shots']} "
                        "shots); scores of different prompts are not compared"
                    )
                pairs.append((row["prediction"] == row["answer"], mate["prediction"] == mate["answer"]))
        if not pairs:
            raise UserError(f"{task}: {first} and {second} have no question in common")
        found = paired([mine for mine, _ in pairs], [his for _, his in pairs])
        mark = "*" if found.p < SIGNIFICANT else ""
        spread = f"{100 * found.low:+.2f} to {100 * found.high:+.2f}"
        difference = f"{100 * (found.second - found.first):+.2f} ({spread}){mark}"
        scores = f"{100 * found.first:.2f} | {100 * found.second:.2f}"
        counts = f"{found.only_first} | {found.only_second}"
        yield f"| {task} ({found.count}) | {scores} | {difference} | {counts} | {found.p:.3g} |"
    yield ""
    yield "Scores are per question here, whatever the benchmark's average. p: exact McNemar test."
