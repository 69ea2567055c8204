"""How long a step waits for other processes: exposed communication, which no computation hides."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

Interval = tuple[int, int]  # nanoseconds, start and end
_MARK = "xverse step"
_COMPUTES = ("aten::", "Torch-Compiled Region", "CompiledFunction")

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would log each start and stop to stderr


@contextlib.contextmanager
def watching(device: torch.device) -> Iterator[Callable[[], tuple[float, float]]]:
    """Profile what runs inside; afterwards the yielded function returns (exposed, all) seconds of
    communication.

    Communication is exposed while a collective runs and nothing is computed: on a GPU no kernel but NCCL's
    runs, on a CPU the thread of the step is in no PyTorch operation. Waiting for a late process counts.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profile = torch.profiler.profile(activities=activities)
    result: list[tuple[float, float]] = []
    with profile:
        with torch.profiler.record_function(_MARK):
            yield lambda: result[0]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    result.append(_seconds(events, on_gpu=device.type == "cuda"))


def _seconds(events: list[Any], on_gpu: bool) -> tuple[float, float]:
    talk: list[Interval] = []
    work: list[Interval] = []
    thread = next((event.start_thread_id() for event in events if event.name() == _MARK), None)
    for event in events:
        name, start = event.name(), event.start_ns()
        interval = start, start + event.duration_ns()
        if on_gpu:
            if event.device_type() == torch.profiler.DeviceType.CUDA:
                (talk if "nccl" in name.lower() else work).append(interval)
        elif name.startswith("gloo:"):
            talk.append(interval)
        elif name.startswith(_COMPUTES) and event.start_thread_id() == thread:
            work.append(interval)
    talk, work = joined(talk), joined(work)
    return (length(talk) - overlap(talk, work)) / 1e9, length(talk) / 1e9


def joined(intervals: list[Interval]) -> list[Interval]:
    """The union of ``intervals`` as disjoint intervals in order."""
    result: list[Interval] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        else:
            result.append((start, end))
    return result


def length(intervals: list[Interval]) -> int:
    """Total length of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def overlap(some: list[Interval], others: list[Interval]) -> int:
    """Length of the intersection of two unions of intervals, as ``joined`` returns them."""
    total, i, j = 0, 0, 0
    while i < len(some) and j < len(others):
        total += max(0, min(some[i][1], others[j][1]) - max(some[i][0], others[j][0]))
        if some[i][1] <= others[j][1]:
            i += 1
        else:
            j += 1
    return total
