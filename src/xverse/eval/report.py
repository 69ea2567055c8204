"""The report of evaluations: the published tables of XVERSE-7B with a row for each run."""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xverse.config import UserError, need
from xverse.eval import published, store
from xverse.eval.adaptive import estimate, needed
from xverse.eval.benchmarks import BENCHMARKS
from xverse.eval.statistics import Score, calibration_error, score
from xverse.files import atomic_file, make_folder, write_text
from xverse.markdown import table
from xverse.texts import read_object

Rows = list[dict[str, Any]]
_LIBRARIES = ("torch", "transformers", "tokenizers")


@dataclass(frozen=True)
class Evaluation:
    """The contents of a folder. ``answers``: by task and subject; ``facts``: time and memory of the run."""

    folder: Path
    settings: dict[str, Any]
    facts: dict[str, Any]
    answers: dict[str, dict[str, Rows]]
    tasks: dict[str, dict[str, Any]]  # those other than multiple choice

    @property
    def name(self) -> str:
        model = Path(self.settings["model"]).name or self.settings["model"]
        precision = self.settings.get("quantize")
        return f"{model} {precision.upper()}" if precision else model


def read(folder: Path) -> Evaluation:
    """Read a folder. Raises UserError if it holds no evaluation or no finished subject."""
    settings = store.settings(folder)
    answers: dict[str, dict[str, Rows]] = {}
    for path in sorted((folder / "answers").glob("*/*.jsonl")):
        answers.setdefault(path.parent.name, {})[path.stem] = store.read(path)
    tasks = {path.stem: read_object(path) for path in sorted((folder / "tasks").glob("*.json"))}
    if not answers and not tasks:
        raise UserError(f"{folder}: no subject has been answered yet")
    facts = folder / "run.json"
    return Evaluation(folder, settings, read_object(facts) if facts.exists() else {}, answers, tasks)


def scores(evaluation: Evaluation, task: str, category: str | None = None) -> Score:
    """The score of a task, or of one of its categories; nan if nothing was scored."""
    average = BENCHMARKS[task].average if task in BENCHMARKS else evaluation.settings["average"][task]
    right, error = _right(evaluation, task, category), evaluation.settings.get("adaptive")
    right = {subject: answers for subject, answers in right.items() if answers}
    if error is None or not right:
        return score(right, average)
    counts = evaluation.settings["counts"][task]
    sizes = {name: counts[name] for name in right}
    return estimate(right, sizes, average, needed(sum(counts.values()), error))


def _right(evaluation: Evaluation, task: str, category: str | None = None) -> dict[str, list[bool]]:
    categories = evaluation.settings["categories"].get(task, {})
    return {
        subject: [row["prediction"] == row["answer"] for row in rows if row["answer"] is not None]
        for subject, rows in evaluation.answers.get(task, {}).items()
        if category is None or categories.get(subject) == category
    }


def write(folder: Path, evaluations: Sequence[Evaluation]) -> None:
    """Write report.md, report.json and report.png, and for C-Eval's test set ceval_submission.json."""
    make_folder(folder)
    for evaluation in evaluations:
        if sent := submission(evaluation):
            write_text(folder / "ceval_submission.json", json.dumps(sent, ensure_ascii=False, indent=1))
    write_text(folder / "report.json", json.dumps(as_json(evaluations), ensure_ascii=False))
    write_text(folder / "report.md", "\n".join(markdown(evaluations)) + "\n")
    plot(evaluations, folder / "report.png")


def as_json(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """The scores of every evaluation, and the first one's questions."""
    first = evaluations[0]
    return {
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "runs": [
            {
                "name": run.name,
                "settings": run.settings,
                "facts": run.facts,
                "tasks": {
                    task: {
                        **_plain(scores(run, task)),
                        "calibration_error": calibration(run, task),
                        "categories": {
                            name: _plain(scores(run, task, name))
                            for name in sorted(set(run.settings["categories"].get(task, {}).values()))
                        },
                        "subjects": {
                            subject: _plain(score({subject: right}, "micro"))
                            for subject, right in _right(run, task).items()
                        },
                    }
                    for task in run.answers
                },
                "figures": {name: task["figures"] for name, task in run.tasks.items()},
            }
            for run in evaluations
        ],
        "questions": [
            row for subjects in first.answers.values() for rows in subjects.values() for row in rows
        ],
    }


def submission(evaluation: Evaluation) -> dict[str, dict[str, str]]:
    """The form in which C-Eval's authors score its test set: letters by subject and id."""
    if "test" not in evaluation.settings["splits"].get("ceval", ""):
        return {}
    return {
        subject: {row["id"].rpartition("/")[2]: row["prediction"] for row in rows}
        for subject, rows in evaluation.answers["ceval"].items()
    }


def markdown(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    names = ", ".join(run.name for run in evaluations)
    yield f"# Evaluation of {names}\n"
    tasks = [task for task in published.OVERALL_COLUMNS if any(task in run.answers for run in evaluations)]
    others = sorted({task for run in evaluations for task in run.answers} - set(published.OVERALL_COLUMNS))
    if tasks:
        marked = ("agieval", "gaokao-bench", "gaokao-english")
        columns = [BENCHMARKS[task].title + "¹" * (task in marked) for task in published.OVERALL_COLUMNS]
        rows = [(f"{name} (published)", kind, values) for name, kind, values in published.OVERALL]
        rows += [
            (f"**{run.name}**", "this run", tuple(_cell(run, task) for task in published.OVERALL_COLUMNS))
            for run in evaluations
        ]
        yield from _table(["model", "type", *columns], rows)
        yield ""
        yield from (f"{note}  " for note in published.FOOTNOTES)
        yield ""
    for task, title, figures in (
        ("mmlu", "MMLU by category", published.MMLU),
        ("ceval", "C-Eval by category", published.CEVAL),
    ):
        if not any(task in run.answers for run in evaluations):
            continue
        yield f"## {title}\n"
        rows = [(f"{name} (published)", kind, values) for name, kind, values in figures]
        for run in evaluations:
            if task in run.answers:
                kinds = (None, *published.CATEGORIES[task])
                values = tuple(_percent(scores(run, task, kind)) for kind in kinds)
                rows.append((f"**{run.name}**", "this run", values))
        yield from _table(["model", "type", *published.CATEGORY_COLUMNS], rows)
        yield ""
    yield from _precisions(evaluations)
    yield from _calibrations(evaluations, [*tasks, *others])
    for name in sorted({name for run in evaluations for name in run.tasks}):
        yield from _figures([run for run in evaluations if name in run.tasks], name)
    yield "## How it was measured\n"
    for task in [*tasks, *others]:
        yield from _method(evaluations, task)
    for run in evaluations:
        yield f"\n{run.name}: {_settings(run)}"
    yield "\n![The scores](report.png)"


def _cell(evaluation: Evaluation, task: str) -> str:
    return _percent(scores(evaluation, task)) if task in evaluation.answers else "–"


def _percent(value: Score) -> str:
    return "–" if math.isnan(value.value) else f"{100 * value.value:.1f}"


def _table(columns: Sequence[str], rows: Sequence[tuple[str, str, Sequence[str]]]) -> list[str]:
    """A table with the best value of each column in bold."""
    best = [
        max((_number(values[index]) for _, _, values in rows), default=math.nan)
        for index in range(len(columns) - 2)
    ]
    marked = [
        [
            *(name, kind),
            *(
                f"**{cell}**" if _number(cell) == top else cell
                for cell, top in zip(values, best, strict=True)
            ),
        ]
        for name, kind, values in rows
    ]
    return table(columns, marked)


def _number(cell: str) -> float:
    text = cell.rstrip("¹²")
    return float(text) if text.replace(".", "", 1).isdigit() else -math.inf


def _precisions(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    """Precision, memory and MMLU of a model that was evaluated at several precisions."""
    own = [run for run in evaluations if "mmlu" in run.answers]
    reference = next((run for run in own if not run.settings.get("quantize")), None)
    if len(own) < 2 or reference is None:
        return
    yield "## Precision\n"
    rows = [("XVERSE-7B-Chat (published)", *row, "", "") for row in published.QUANTISED]
    for run in own:
        memory = run.facts.get("peak_memory_gb")
        precision = (run.settings.get("quantize") or str(run.settings.get("dtype", ""))).upper()
        same, divergence = agreement(reference, run, "mmlu")
        beside = ("", "") if run is reference else (f"{100 * same:.1f} %", f"{divergence:.4f}")
        shown = "–" if memory is None else f"{memory:.1f}"
        rows.append((run.name, precision, shown, _percent(scores(run, "mmlu")), *beside))
    head = ("model", "precision", "memory (GB)", "MMLU", "same prediction", "KL of the letters")
    yield from table(head, rows)
    yield "\nKL divergence from the unquantised probabilities of the letters: nats, mean over questions.\n"


def calibration(evaluation: Evaluation, task: str) -> float | None:
    """The expected calibration error of the letters' probabilities; None if nothing was scored."""
    rows = [row for rows in evaluation.answers[task].values() for row in rows if row["answer"] is not None]
    if not rows:
        return None
    confidences = [math.exp(_normal(row["logprobs"])[row["prediction"]]) for row in rows]
    return calibration_error(confidences, [row["prediction"] == row["answer"] for row in rows])


def _calibrations(evaluations: Sequence[Evaluation], tasks: Sequence[str]) -> Iterator[str]:
    if not tasks:
        return
    yield "## Calibration\n"
    rows = []
    for run in evaluations:
        errors = [calibration(run, task) if task in run.answers else None for task in tasks]
        rows.append([run.name, *("–" if error is None else f"{error:.3f}" for error in errors)])
    yield from table(["model", *tasks], rows)
    yield "\nExpected calibration error: the distance between the likeliest letter's probability among the "
    yield "letters and the accuracy, in ten bins of equal width.\n"


def agreement(reference: Evaluation, other: Evaluation, task: str) -> tuple[float, float]:
    """Share of equal predictions, and the mean KL(reference ‖ other) of the letters' probabilities."""
    mine = {(row["subject"], row["id"]): row for rows in other.answers[task].values() for row in rows}
    pairs = [
        (row, mine[row["subject"], row["id"]])
        for rows in reference.answers[task].values()
        for row in rows
        if (row["subject"], row["id"]) in mine
    ]
    if not pairs:
        raise UserError(f"{other.folder}: no question of {task} in common with {reference.folder}")
    same = sum(one["prediction"] == two["prediction"] for one, two in pairs) / len(pairs)
    return same, sum(_divergence(one["logprobs"], two["logprobs"]) for one, two in pairs) / len(pairs)


def _normal(values: dict[str, float]) -> dict[str, float]:
    """Log-probabilities among the letters."""
    top = max(values.values())
    total = top + math.log(sum(math.exp(value - top) for value in values.values()))
    return {letter: value - total for letter, value in values.items()}


def _divergence(one: dict[str, float], other: dict[str, float]) -> float:
    p, q = _normal(one), _normal(other)
    return sum(math.exp(p[letter]) * (p[letter] - q[letter]) for letter in p)


def _figures(evaluations: Sequence[Evaluation], name: str) -> Iterator[str]:
    first = evaluations[0].tasks[name]
    yield f"## {first['title']}\n"
    rows = [
        [figure, *(f"{run.tasks[name]['figures'].get(figure, math.nan):.4g}" for run in evaluations)]
        for figure in first["figures"]
    ]
    yield from table(["", *(run.name for run in evaluations)], rows)
    page = f" The replies: [{name}.md]({name}.md)." if first["page"] else ""
    yield f"\n{first['method'].capitalize()}.{page}\n"


def _method(evaluations: Sequence[Evaluation], task: str) -> Iterator[str]:
    how = next(run.settings["methods"][task] for run in evaluations if task in run.answers)
    yield f"- **{how['title']}**: {how['method']}. Average: {how['average']}. Shots: {how['shots']}."
    for run in evaluations:
        if task not in run.answers:
            continue
        value = scores(run, task)
        skipped = len(run.settings["skipped"].get(task, []))
        answers = [row for rows in run.answers[task].values() for row in rows]
        fewer = sum(row["shots"] < run.settings["shots"] for row in answers)
        text = f"  - {run.name}: {100 * value.value:.2f} ± {100 * value.error:.2f} %"
        text += f" (95 %: {100 * value.low:.2f} to {100 * value.high:.2f}), {value.count} questions"
        text += f" of split {run.settings['splits'][task]}"
        if fewer:
            text += f"; {fewer} with fewer than {run.settings['shots']} shots, which did not fit"
        if skipped:
            text += f"; {skipped} malformed rows skipped"
        yield text


def _settings(evaluation: Evaluation) -> str:
    shown = {
        name: value for name, value in evaluation.settings.items() if not isinstance(value, (dict, list))
    }
    return ", ".join(f"{name} {value}" for name, value in {**shown, **evaluation.facts}.items())


def plot(evaluations: Sequence[Evaluation], path: Path) -> None:
    """Bars with 95 % intervals, XVERSE-7B's published scores as marks, chance as a line."""
    matplotlib = need("matplotlib.figure", "eval", "report.png")
    tasks = [task for task in BENCHMARKS if any(task in run.answers for run in evaluations)]
    if not tasks:
        return
    figure = matplotlib.Figure(figsize=(1.6 + 1.5 * len(tasks), 4), layout="tight")
    axis = figure.subplots()
    width = 0.8 / len(evaluations)
    for number, run in enumerate(evaluations):
        values = [scores(run, task) if task in run.answers else None for task in tasks]
        at = [index + (number - (len(evaluations) - 1) / 2) * width for index in range(len(tasks))]
        pairs = [(place, one) for place, one in zip(at, values, strict=True) if one is not None]
        heights = [100 * one.value for _, one in pairs]
        below = [100 * (one.value - one.low) for _, one in pairs]
        above = [100 * (one.high - one.value) for _, one in pairs]
        places = [place for place, _ in pairs]
        axis.bar(places, heights, width, yerr=[below, above], capsize=3, label=run.name)
    xverse = dict(zip(published.OVERALL_COLUMNS, published.OVERALL[-2][2], strict=True))
    marks = [(index, float(xverse[task].rstrip("²"))) for index, task in enumerate(tasks) if task in xverse]
    places, heights = [place for place, _ in marks], [height for _, height in marks]
    axis.scatter(places, heights, marker="_", s=600, color="black", label="XVERSE-7B, published")
    axis.axhline(25, color="grey", linestyle=":", linewidth=1, label="one of four")
    axis.set_xticks(range(len(tasks)), [BENCHMARKS[task].title for task in tasks])
    axis.set_ylabel("right answers, %")
    axis.set_ylim(0, 100)
    axis.legend(fontsize="small")
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _plain(score: Score) -> dict[str, float | int | None]:
    """A score for JSON, with nan as null."""
    return {name: None if value != value else value for name, value in asdict(score).items()}
