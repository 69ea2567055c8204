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
                split=options.split or benchmark.splits[0],
                subjects=tuple(subjects),
                skipped=tuple(reader.skipped),
            )
        )
    return benchmarks


@dataclass(frozen=True)
class _Run:
    """A run that answers into ``out``; ``progress(subject, questions)`` is called as questions are."""

    backend: Backend
    out: Path
    shots: int
    progress: Callable[[str, int], None]

    def whole(self, benchmark: Benchmark, subject: Subject) -> int:
        """Answer a subject, if that has not been done; returns how many questions were new."""
        path = store.path_of(self.out, benchmark.name, subject.name)
        if path.exists():
            self.progress(subject.name, len(subject.questions))
            return 0
        if len(subject.shots) < self.shots:
            notice(f"eval: {benchmark.name}, {subject.name}: only {len(subject.shots)} shots of {self.shots}")
        store.write(path, self._rows(benchmark, subject))
        return len(subject.questions)

    def sample(self, loaded: LoadedBenchmark, error: float) -> int:
        """Answer a random sample of a benchmark whose score has this standard error; returns how many
        questions were new."""
        benchmark, new = loaded.benchmark, 0
        subjects = {subject.name: subject for subject in loaded.subjects if subject.questions}
        if any(question.answer is None for s in subjects.values() for question in s.questions):
            raise UserError(f"--adaptive: {benchmark.name} has questions without a public answer; omit it")

        def answer(counts: dict[str, int]) -> dict[str, list[bool]]:
            nonlocal new
            right = {}
            for name, count in counts.items():
                subject, path = subjects[name], store.path_of(self.out, benchmark.name, name)
                rows = store.read(path) if path.exists() else []
                if len(rows) < count:
                    order = random_order(len(subject.questions), "adaptive", benchmark.name, name).tolist()
                    chosen = tuple(subject.questions[i] for i in order[len(rows) : count])
                    rows += self._rows(benchmark, replace(subject, questions=chosen))
                    new += len(chosen)
                    store.write(path, rows)
                right[name] = [row["prediction"] == row["answer"] for row in rows[:count]]
            return right

        sizes = {name: len(subject.questions) for name, subject in subjects.items()}
        sequential(sizes, benchmark.average, error, answer)
        return new

    def _rows(self, benchmark: Benchmark, subject: Subject) -> list[dict[str, Any]]:
        reported = 0

        def report(done: int) -> None:
            nonlocal reported
            self.progress(subject.name, done - reported)
            reported = done

        prompts = make_prompts(self.backend, benchmark, subject, self.shots)
        answers = score_prompts(self.backend, prompts, report)
        return [store.row(benchmark.name, subject.name, answer) for answer in answers]


def to_folder(
    benchmarks: Sequence[LoadedBenchmark],
    backend: Backend,
    out: Path,
    settings: dict[str, Any],
    *,
    shard: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """Answer the unanswered questions of a ``shard`` (index, count), with a progress bar on stderr; stores
    the settings, and time and memory in ``run.json``.

    ``settings``: everything that the answers depend on; with ``adaptive`` only a random sample of each
    benchmark that has this standard error. Subjects are dealt to shards largest first, which balances them.
    Raises UserError where the folder holds others.
    """
    store.begin(out, {**settings, **described(benchmarks)})
    begin = time.monotonic()
    number, shards = shard
    order = [(loaded.benchmark, subject) for loaded in benchmarks for subject in loaded.subjects]
    order.sort(key=lambda pair: -len(pair[1].questions))
    order = order[number::shards]
    with log.progress() as bar:
        line = bar.add_task("eval", total=sum(len(subject.questions) for _, subject in order))

        def report(subject: str, done: int) -> None:
            bar.update(line, advance=done, description=subject)

        run, error = _Run(backend, out, settings["shots"], report), settings.get("adaptive")
        if error is None:
            answered = sum(run.whole(benchmark, subject) for benchmark, subject in order)
        else:
            answered = sum(run.sample(loaded, error) for loaded in benchmarks)
    seconds = time.monotonic() - begin
    facts = {
        "questions": answered,
        "seconds": round(seconds, 1),
        "questions_per_second": round(answered / seconds, 2) if answered else None,
        "peak_memory_gb": round(hardware.peak_memory() / 1e9, 2),
    }
    if answered and shard == (0, 1):
        write_json(out / "run.json", facts)
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
        write_json(path, asdict(outcome))


def described(benchmarks: Sequence[LoadedBenchmark]) -> dict[str, dict[str, Any]]:
    """How each task is prompted and averaged, for the report."""

    def of_each(value: Callable[[LoadedBenchmark], Any]) -> dict[str, Any]:
        return {loaded.benchmark.name: value(loaded) for loaded in benchmarks}

    def method(loaded: LoadedBenchmark) -> dict[str, str]:
        one = loaded.benchmark
        return {"title": one.title, "method": one.method, "average": one.average, "shots": one.shots_rule}

    return {
        "average": of_each(lambda loaded: loaded.benchmark.average),
        "splits": of_each(lambda loaded: loaded.split),
        "methods": of_each(method),
        "categories": of_each(lambda loaded: {one.name: one.category for one in loaded.subjects}),
        "counts": of_each(lambda loaded: {one.name: len(one.questions) for one in loaded.subjects}),
        "skipped": of_each(lambda loaded: list(loaded.skipped)),
    }
