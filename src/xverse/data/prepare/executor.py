"""Running a recipe's phases: in local processes, or on a cluster with datatrove's Slurm and Ray executors.

A phase calls ``work(None, rank, tasks)`` for each of its tasks, as in datatrove's pipelines; completion
markers are in ``LOGS/PHASE-TASKS/completions``. Tasks write files atomically and skip existing ones, so a
killed phase is run again.

Local runs use a subclass of datatrove's ``PipelineExecutor``, because datatrove's ``LocalPipelineExecutor``
hangs when a worker is killed (for example by the OOM killer), and its workers outlive a killed parent.
"""

from __future__ import annotations

import errno
import inspect
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datatrove.executor.base import DistributedEnvVars, PipelineExecutor
from datatrove.utils.stats import PipelineStats

from xverse.config import UserError, nearest
from xverse.hardware import cores
from xverse.log import progress


@dataclass
class ExecutorConfig:
    """``workers``: concurrent tasks (default: every usable core; on a cluster no limit). ``tasks``: number of
    tasks into which each phase is divided at most (default: four times the workers; 1,000 on a cluster).
    ``options``: further arguments of datatrove's ``SlurmPipelineExecutor`` or ``RayPipelineExecutor``:
    partition, time, mem_per_cpu_gb, venv_path, …
    """

    kind: Literal["local", "slurm", "ray"] = "local"
    workers: int | None = None
    tasks: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(value is not None and value < 1 for value in (self.tasks, self.workers)):
            raise ValueError("executor: workers and tasks must be at least 1")
        if self.options and self.kind == "local":
            raise ValueError("executor: a local run takes no options")

    @property
    def most_tasks(self) -> int:
        """``tasks``, or its default."""
        here = 4 * (self.workers or cores().usable)
        return self.tasks or (here if self.kind == "local" else 1_000)


@dataclass
class Phase:
    """One step of a run: ``work(None, rank, tasks)`` for every rank below ``tasks``."""

    name: str
    work: Callable[[Any, int, int], None]
    tasks: int = 1

    def logs(self, folder: Path) -> str:
        """Where its completion markers are: those of another division into tasks mean nothing to it."""
        return str(folder / f"{self.name}-{self.tasks}")


def run_phases(phases: list[Phase], config: ExecutorConfig, logs: Path) -> bool:
    """Run the missing tasks of the phases in order.

    Returns False if they were submitted to a cluster's queue. Raises the UserErrors of the tasks, and
    UserError for a full disk or a killed worker.
    """
    if config.kind == "local":
        _run_here(phases, config, logs)
        return True
    executors: list[PipelineExecutor] = []
    for phase in phases:
        executors.append(_cluster_executor(phase, config, logs, executors[-1] if executors else None))
    if config.kind == "slurm":
        executors[-1].run()  # submits its dependencies first
        return all(not executor.get_incomplete_ranks() for executor in executors)
    for executor in executors:
        executor.run()
        if executor.get_incomplete_ranks():
            raise UserError(f"{logs}: a phase of the run failed; its log is in this folder")
    return True


def _cluster_executor(
    phase: Phase, config: ExecutorConfig, logs: Path, before: PipelineExecutor | None
) -> PipelineExecutor:
    kind: type[PipelineExecutor]
    if config.kind == "slurm":
        from datatrove.executor.slurm import SlurmPipelineExecutor

        kind = SlurmPipelineExecutor
    else:
        from datatrove.executor.ray import RayPipelineExecutor

        kind = RayPipelineExecutor
    known = set(inspect.signature(kind).parameters)
    known -= {"pipeline", "tasks", "workers", "logging_dir", "depends"}
    for name in config.options:
        if name not in known:
            raise UserError(f"executor.options: {config.kind} has no '{name}'{nearest(name, known)}")
    if config.kind == "slurm":
        for name in ("partition", "time"):
            if name not in config.options:
                raise UserError(f"executor.options: slurm needs '{name}'")
    options = {**({"job_name": f"xverse-{phase.name}"} if config.kind == "slurm" else {}), **config.options}
    try:
        return kind(
            pipeline=[phase.work],
            tasks=phase.tasks,
            workers=config.workers or -1,
            logging_dir=phase.logs(logs),
            depends=before,
            **options,
        )
    except (ImportError, ValueError) as error:
        raise UserError(f"executor.kind: {config.kind}: {error}") from None


class LocalExecutor(PipelineExecutor):
    """Runs a phase's tasks in this process, or in a pool of processes shared by all phases."""

    def __init__(self, phase: Phase, logs: Path, pool: ProcessPoolExecutor | None) -> None:
        super().__init__([phase.work], phase.logs(logs))
        self.phase, self.pool = phase, pool
        self.done: Callable[[], None] = _nothing

    def run(self) -> None:
        """Run the tasks that are not completed yet; ``done`` is called after each."""
        ranks = self.get_incomplete_ranks()
        for _ in range(self.world_size - len(ranks)):
            self.done()
        pool, self.pool = self.pool, None  # the pool cannot be pickled for the workers
        done, self.done = self.done, _nothing
        if pool is None or len(ranks) < 2:
            for rank in ranks:
                self._run_for_rank(rank)
                done()
            return
        futures = [pool.submit(self._run_for_rank, rank) for rank in ranks]
        try:
            for future in as_completed(futures):
                future.result()
                done()
        except BrokenProcessPool:
            raise UserError(
                f"{self.phase.name}: a worker was killed, perhaps because memory ran out; run the command "
                "again to resume, if needed with a smaller executor.workers"
            ) from None
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        try:
            data: Any = None
            for step in self.pipeline:
                data = step(data, rank, self.world_size)
            deque(data or (), maxlen=0)
            self.mark_rank_as_completed(rank)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"{error.filename or self.phase.name}: the disk is full; free space and run the command "
                    "again to resume"
                ) from None
            raise
        return PipelineStats()

    @property
    def world_size(self) -> int:
        return self.phase.tasks

    def get_distributed_env(self, node_rank: int = -1) -> DistributedEnvVars:
        raise AssertionError("only clusters need this")


def _run_here(phases: list[Phase], config: ExecutorConfig, logs: Path) -> None:
    workers = min(config.workers or cores().usable, max(phase.tasks for phase in phases))
    with ExitStack() as stack:
        pool = None
        if workers > 1:
            context = multiprocessing.get_context("spawn")  # fork is unsafe with the tokenizer's threads
            pool = ProcessPoolExecutor(workers, context, _start_worker)
            stack.callback(pool.shutdown, cancel_futures=True)
        bar = stack.enter_context(progress())
        for phase in phases:
            task = bar.add_task(phase.name, total=phase.tasks)
            executor = LocalExecutor(phase, logs, pool)
            executor.done = lambda task=task: bar.advance(task)  # type: ignore[misc]
            executor.run()
            bar.remove_task(task)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, name="end-with-parent", daemon=True).start()


def _nothing() -> None:
    pass
