"""Comparison of two evaluations on the questions that both answered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from xverse.config import UserError
from xverse.eval import report
from xverse.eval.statistics import holm, paired, questions_needed
from xverse.markdown import table

SIGNIFICANT = 0.05


def lines(first: Path, second: Path) -> Iterator[str]:
    """A Markdown table, and the subjects that differ. Raises UserError where they have no question in common,
    or different prompts."""
    one, other = report.read(first), report.read(second)
    tasks = [task for task in one.answers if task in other.answers]
    if not tasks:
        raise UserError(f"{first} and {second} have no task in common")
    head = ["task", one.name, other.name, "difference (95 %)", f"only {one.name}", f"only {other.name}", "p"]
    shown = []
    subjects: dict[str, list[tuple[bool, bool]]] = {}
    differ = total = 0
    for task in tasks:
        pairs = []
        theirs = {(row["subject"], row["id"]): row for rows in other.answers[task].values() for row in rows}
        for rows in one.answers[task].values():
            for row in rows:
                match = theirs.get((row["subject"], row["id"]))
                if match is None or row["answer"] is None:
                    continue
                if match["prompt"] != row["prompt"]:
                    raise UserError(
                        f"{task}, {row['id']}: the prompts differ ({row['shots']} and {match['shots']} "
                        "shots); scores of different prompts are not compared"
                    )
                pair = (row["prediction"] == row["answer"], match["prediction"] == match["answer"])
                pairs.append(pair)
                subjects.setdefault(f"{task}: {row['subject']}", []).append(pair)
        if not pairs:
            raise UserError(f"{task}: {first} and {second} have no question in common")
        result = paired([first for first, _ in pairs], [second for _, second in pairs])
        mark = "*" if result.p < SIGNIFICANT else ""
        spread = f"{100 * result.low:+.2f} to {100 * result.high:+.2f}"
        difference = f"{100 * (result.second - result.first):+.2f} ({spread}){mark}"
        scores = (f"{100 * result.first:.2f}", f"{100 * result.second:.2f}")
        counts = (str(result.only_first), str(result.only_second))
        shown.append([f"{task} ({result.count})", *scores, difference, *counts, f"{result.p:.3g}"])
        differ, total = differ + result.only_first + result.only_second, total + result.count
    yield from table(head, shown)
    yield ""
    yield from _by_subject(subjects)
    yield (
        f"Seeing a difference of one point with a power of 80 % takes {questions_needed(differ / total):,} "
        f"questions, since {100 * differ / total:.1f} % are answered right by one model only."
    )
    yield "Scores are averages over questions, whatever the benchmark's rule. p: exact McNemar test."


def _by_subject(subjects: dict[str, list[tuple[bool, bool]]]) -> Iterator[str]:
    """The subjects whose scores differ significantly, if all of them are tested at once."""
    if len(subjects) < 2:
        return
    results = {
        name: paired([one for one, _ in pairs], [other for _, other in pairs])
        for name, pairs in subjects.items()
    }
    corrected = dict(zip(results, holm([result.p for result in results.values()]), strict=True))
    found = [
        f"{name} ({100 * (results[name].second - results[name].first):+.1f}, p = {p:.3g})"
        for name, p in corrected.items()
        if p < SIGNIFICANT
    ]
    yield f"Subjects that differ, with Holm's correction over {len(subjects)}: {', '.join(found) or 'none'}."
