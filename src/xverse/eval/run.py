"""An evaluation: tasks, subject by subject, into a folder of answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from xverse import hardware, log
from xverse.config import UserError, choose
from xverse.data.benchmarks.custom import is_description
from xverse.data.benchmarks.questions import Options, QuestionReader, Subject
from xverse.eval import custom, store
from xverse.eval.backends import EngineBackend
from xverse.eval.benchmark import Benchmark
from xverse.eval.benchmarks import BENCHMARKS
from xverse.eval.generation import Settings
from xverse.eval.scoring import Backend, answers, ask
from xverse.eval.tasks import TASKS
from xverse.files import atomic_file
from xverse.log import notice

SHOTS = 5


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be asked. ``limit``: so many questions of each subject, from the beginning."""

    benchmark: Benchmark
    split: str
    subjects: tuple[Subject, ...]
    skipped: tuple[str, ...]

    @property
    def count(self) -> int:
        return sum(len(subject.questions) for subject in self.subjects)


def plan(
    names: Sequence[str],
    data_dir: Path,
    *,
    options: Options | None = None,
    limit: int | None = None,
    skip_malformed: bool = False,
) -> list[Plan]:
    """Read the benchmarks. Raises UserError for an unknown one, missing data or a malformed row."""
    plans = []
    for name in dict.fromkeys(names):
        benchmark = custom.load(Path(name)) if is_description(name) else choose("task", name, BENCHMARKS)
        asked = options or Options()
        if asked.split is not None and asked.split not in benchmark.splits:
            raise UserError(f"--split: {name} has {', '.join(benchmark.splits)}, not '{asked.split}'")
        reader = QuestionReader(skip=skip_malformed)
        subjects = benchmark.load(data_dir / benchmark.folder, reader, asked)
        if limit is not None:
            subjects = [replace(each, questions=each.questions[:limit]) for each in subjects]
        plans.append(
            Plan(
                benchmark=benchmark,
                split=asked.split or benchmark.split,
                subjects=tuple(subjects),
                skipped=tuple(reader.skipped),
            )
        )
    return plans


def run(
    plans: Sequence[Plan],
    backend: Backend,
    out: Path,
    *,
    shots: int = SHOTS,
    shard: tuple[int, int] = (0, 1),
    progress: Callable[[str, int], None] | None = None,
) -> int:
    """Answer what is not answered yet of this shard (number, of so many); returns how many questions.

    ``progress(subject, questions)`` is told after some of them. Subjects go to shards in turn, the largest
    first, so that all have about as much to do.
    """
    answered = 0
    for each, subject in _of_shard(plans, shard):
        path = store.path_of(out, each.benchmark.name, subject.name)
        if not path.exists():
            answered += _subject(each.benchmark, subject, backend, path, shots, progress)
        elif progress is not None:
            progress(subject.name, len(subject.questions))
    return answered


def _of_shard(plans: Sequence[Plan], shard: tuple[int, int]) -> list[tuple[Plan, Subject]]:
    number, shards = shard
    order = [(each, subject) for each in plans for subject in each.subjects]
    order.sort(key=lambda pair: -len(pair[1].questions))
    return order[number::shards]


def _subject(
    benchmark: Benchmark,
    subject: Subject,
    backend: Backend,
    path: Path,
    shots: int,
    progress: Callable[[str, int], None] | None,
) -> int:
    if len(subject.shots) < shots and not path.exists():
        notice(f"eval: {benchmark.name}, {subject.name}: only {len(subject.shots)} shots of {shots}")
    told = 0

    def tell(done: int) -> None:
        nonlocal told
        if progress is not None:
            progress(subject.name, done - told)
        told = done

    found = answers(backend, ask(backend, benchmark, subject, shots), tell)
    rows: list[dict[str, Any]] = [store.row(benchmark.name, subject.name, answered) for answered in found]
    store.write(path, rows)
    return len(rows)


def to_folder(
    plans: Sequence[Plan],
    backend: Backend,
    out: Path,
    asked: dict[str, Any],
    *,
    shard: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """``run`` with its settings in the folder, a progress bar on stderr, and how it went in ``run.json``.

    ``asked``: the settings that decide the answers. Raises UserError where the folder holds others.
    """
    store.begin(out, {**asked, **described(plans)})
    begin = time.monotonic()
    total = sum(len(subject.questions) for _, subject in _of_shard(plans, shard))
    with log.progress() as bar:
        line = bar.add_task("eval", total=total)

        def tell(subject: str, done: int) -> None:
            bar.update(line, advance=done, description=subject)

        answered = run(plans, backend, out, shots=asked["shots"], shard=shard, progress=tell)
    seconds = time.monotonic() - begin
    facts = {
        "questions": answered,
        "seconds": round(seconds, 1),
        "questions_per_second": round(answered / seconds, 2) if answered else None,
        "peak_memory_gb": round(hardware.peak_memory() / 1e9, 2),
    }
    if answered and shard == (0, 1):
        store.write_json(out / "run.json", facts)
    return facts


def run_tasks(
    names: Sequence[str], backend: EngineBackend, data_dir: Path, out: Path, settings: Settings
) -> None:
    """The tasks that are no multiple choice, each into a file of its own; what stands there stays."""
    for name in names:
        path = out / "tasks" / f"{name}.json"
        if path.exists():
            continue
        with log.progress() as bar:
            line = bar.add_task(name, total=None)

            def tell(done: int, of: int, line: Any = line, bar: Any = bar) -> None:
                bar.update(line, completed=done, total=of)

            outcome = choose("task", name, TASKS)(backend.engine, backend.stop_ids, data_dir, settings, tell)
        path.parent.mkdir(parents=True, exist_ok=True)
        if outcome.page:
            with atomic_file(out / f"{name}.md") as partial:
                partial.write_text(outcome.page + "\n", encoding="utf-8")
        store.write_json(path, asdict(outcome))


def described(plans: Sequence[Plan]) -> dict[str, Any]:
    """What a report has to say of how each task was asked."""
    return {
        "average": {each.benchmark.name: each.benchmark.average for each in plans},
        "splits": {each.benchmark.name: each.split for each in plans},
        "methods": {
            each.benchmark.name: {
                "title": each.benchmark.title,
                "method": each.benchmark.method,
                "average": each.benchmark.average,
                "shots": each.benchmark.shots_rule,
            }
            for each in plans
        },
        "categories": {
            each.benchmark.name: {subject.name: subject.category for subject in each.subjects}
            for each in plans
        },
        "counts": {
            each.benchmark.name: {subject.name: len(subject.questions) for subject in each.subjects}
            for each in plans
        },
        "skipped": {each.benchmark.name: list(each.skipped) for each in plans},
    }
