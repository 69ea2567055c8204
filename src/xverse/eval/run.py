"""Running an evaluation: tasks, subject by subject, into a folder of answers."""

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
from xverse.data.order import random_order
from xverse.eval import custom, store
from xverse.eval.adaptive import sequential
from xverse.eval.backends import EngineBackend, TransformersBackend
from xverse.eval.benchmark import Benchmark
from xverse.eval.benchmarks import BENCHMARKS
from xverse.eval.generation import TaskRun, TaskSettings
from xverse.eval.scoring import Backend, make_prompts, score_prompts
from xverse.eval.tasks import TASKS
from xverse.files import write_json, write_text
from xverse.log import notice

SHOTS = 5


@dataclass(frozen=True, kw_only=True)
class LoadedBenchmark:
    """A benchmark with the questions to answer, and the malformed rows that were skipped."""

    benchmark: Benchmark
    split: str
    subjects: tuple[Subject, ...]
    skipped: tuple[str, ...]

    @property
    def count(self) -> int:
        return sum(len(subject.questions) for subject in self.subjects)


def load_benchmarks(
    names: Sequence[str],
    data_dir: Path,
    *,
    options: Options | None = None,
    limit: int | None = None,
    skip_malformed: bool = False,
) -> list[LoadedBenchmark]:
    """Read the benchmarks, at most the first ``limit`` questions of each subject.

    Raises UserError for an unknown benchmark, missing data or a malformed row.
    """
    benchmarks = []
    for name in dict.fromkeys(names):
        benchmark = custom.load(Path(name)) if is_description(name) else choose("task", name, BENCHMARKS)
        options = options or Options()
        if options.split is not None and options.split not in benchmark.splits:
            raise UserError(f"--split: {name} has {', '.join(benchmark.splits)}, not '{options.split}'")
        reader = QuestionReader(skip=skip_malformed)
        subjects = benchmark.load(data_dir / benchmark.folder, reader, options)
        if limit is not None:
            subjects = [replace(subject, questions=subject.questions[:limit]) for subject in subjects]
        benchmarks.append(
            LoadedBenchmark(
                benchmark=benchmark,
                split=options.split or benchmark.split,
                subjects=tuple(subjects),
                skipped=tuple(reader.skipped),
            )
        )
    return benchmarks


def run(
    benchmarks: Sequence[LoadedBenchmark],
    backend: Backend,
    out: Path,
    *,
    shots: int = SHOTS,
    shard: tuple[int, int] = (0, 1),
    error: float | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> int:
    """Answer the unanswered questions of a shard (index, count); returns how many there were.

    With ``error`` only a random sample of each benchmark that has this standard error. ``progress(subject,
    questions)`` is called as questions are answered. Subjects are dealt to shards largest first, which
    balances them.
    """
    answered = 0
    if error is not None:
        return sum(_sampled(loaded, backend, out, shots, error, progress) for loaded in benchmarks)
    for loaded, subject in _of_shard(benchmarks, shard):
        path = store.path_of(out, loaded.benchmark.name, subject.name)
        if not path.exists():
            answered += _subject(loaded.benchmark, subject, backend, path, shots, progress)
        elif progress is not None:
            progress(subject.name, len(subject.questions))
    return answered


def _sampled(
    loaded: LoadedBenchmark,
    backend: Backend,
    out: Path,
    shots: int,
    error: float,
    progress: Callable[[str, int], None] | None,
) -> int:
    """Answer a sample of a benchmark; returns how many questions were new."""
    benchmark, new = loaded.benchmark, 0
    subjects = {subject.name: subject for subject in loaded.subjects if subject.questions}
    if any(question.answer is None for s in subjects.values() for question in s.questions):
        raise UserError(f"--adaptive: {benchmark.name} has questions without a public answer; omit it")

    def answer(counts: dict[str, int]) -> dict[str, list[bool]]:
        nonlocal new
        right = {}
        for name, count in counts.items():
            subject, path = subjects[name], store.path_of(out, benchmark.name, name)
            rows = store.read(path) if path.exists() else []
            if len(rows) < count:
                order = random_order(len(subject.questions), "adaptive", benchmark.name, name).tolist()
                chosen = tuple(subject.questions[i] for i in order[len(rows) : count])
                drawn = replace(subject, questions=chosen)
                prompts = make_prompts(backend, benchmark, drawn, shots)
                rows += [store.row(benchmark.name, name, one) for one in score_prompts(backend, prompts)]
                new += len(drawn.questions)
                store.write(path, rows)
                if progress is not None:
                    progress(name, len(drawn.questions))
            right[name] = [row["prediction"] == row["answer"] for row in rows[:count]]
        return right

    sizes = {name: len(subject.questions) for name, subject in subjects.items()}
    sequential(sizes, benchmark.average, error, answer)
    return new


def _of_shard(
    benchmarks: Sequence[LoadedBenchmark], shard: tuple[int, int]
) -> list[tuple[LoadedBenchmark, Subject]]:
    number, shards = shard
    order = [(loaded, subject) for loaded in benchmarks for subject in loaded.subjects]
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
    reported = 0

    def report(done: int) -> None:
        nonlocal reported
        if progress is not None:
            progress(subject.name, done - reported)
        reported = done

    answers = score_prompts(backend, make_prompts(backend, benchmark, subject, shots), report)
    rows: list[dict[str, Any]] = [store.row(benchmark.name, subject.name, answer) for answer in answers]
    store.write(path, rows)
    return len(rows)


def to_folder(
    benchmarks: Sequence[LoadedBenchmark],
    backend: Backend,
    out: Path,
    settings: dict[str, Any],
    *,
    shard: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """``run`` with a progress bar on stderr; stores the settings, and time and memory in ``run.json``.

    ``settings``: everything that the answers depend on. Raises UserError where the folder holds others.
    """
    store.begin(out, {**settings, **described(benchmarks)})
    begin = time.monotonic()
    total = sum(len(subject.questions) for _, subject in _of_shard(benchmarks, shard))
    with log.progress() as bar:
        line = bar.add_task("eval", total=total)

        def report(subject: str, done: int) -> None:
            bar.update(line, advance=done, description=subject)

        answered = run(
            benchmarks,
            backend,
            out,
            shots=settings["shots"],
            shard=shard,
            error=settings.get("adaptive"),
            progress=report,
        )
    seconds = time.monotonic() - begin
    facts = {
        "questions": answered,
        "seconds": round(seconds, 1),
        "questions_per_second": round(answered / seconds, 2) if answered else None,
        "peak_memory_gb": round(hardware.peak_memory() / 1e9, 2),
    }
    if answered and shard == (0, 1):
        write_json(out / "run.json", facts, indent=2)
    return facts


def run_tasks(
    names: Sequence[str],
    backend: EngineBackend | TransformersBackend,
    data_dir: Path,
    out: Path,
    settings: TaskSettings,
) -> None:
    """Run the tasks other than multiple choice, each into one file; skip those that have one."""
    for name in names:
        path = out / "tasks" / f"{name}.json"
        if path.exists():
            continue
        with log.progress() as bar:
            line = bar.add_task(name, total=None)

            def report(done: int, of: int, line: Any = line, bar: Any = bar) -> None:
                bar.update(line, completed=done, total=of)

            task = TaskRun(backend.engine, backend.stop_ids, data_dir, settings, report)
            outcome = choose("task", name, TASKS)(task)
        if outcome.page:
            write_text(out / f"{name}.md", outcome.page + "\n")
        write_json(path, asdict(outcome), indent=2)


def described(benchmarks: Sequence[LoadedBenchmark]) -> dict[str, Any]:
    """How each task is prompted and averaged, for the report."""
    return {
        "average": {loaded.benchmark.name: loaded.benchmark.average for loaded in benchmarks},
        "splits": {loaded.benchmark.name: loaded.split for loaded in benchmarks},
        "methods": {
            loaded.benchmark.name: {
                "title": loaded.benchmark.title,
                "method": loaded.benchmark.method,
                "average": loaded.benchmark.average,
                "shots": loaded.benchmark.shots_rule,
            }
            for loaded in benchmarks
        },
        "categories": {
            loaded.benchmark.name: {subject.name: subject.category for subject in loaded.subjects}
            for loaded in benchmarks
        },
        "counts": {
            loaded.benchmark.name: {subject.name: len(subject.questions) for subject in loaded.subjects}
            for loaded in benchmarks
        },
        "skipped": {loaded.benchmark.name: list(loaded.skipped) for loaded in benchmarks},
    }
