"""How long a step waits for other processes: communication that no computation hides."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

Interval = tuple[int, int]  # nanoseconds, start and end
_MARK = "xverse step"
_COMPUTES = ("aten::", "Torch-Compiled Region", "CompiledFunction")

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would tell stderr whenever it starts and stops


@contextlib.contextmanager
def watching(device: torch.device) -> Iterator[Callable[[], tuple[float, float]]]:
    """Profile what runs inside; afterwards what it yields returns (exposed, all) seconds of communication.

    Exposed are the times in which a collective was under way and nothing was computed: on a GPU no kernel but
    NCCL's ran, on a CPU the thread of the step was in none of PyTorch's operations. Waiting for a process
    that comes late to a collective is part of it.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profile = torch.profiler.profile(activities=activities)
    found: list[tuple[float, float]] = []
    with profile:
        with torch.profiler.record_function(_MARK):
            yield lambda: found[0]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    found.append(_seconds(events, on_gpu=device.type == "cuda"))


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
    """The same times as intervals that do not touch, in order."""
    result: list[Interval] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        else:
            result.append((start, end))
    return result


def length(intervals: list[Interval]) -> int:
    return sum(end - start for start, end in intervals)


def overlap(some: list[Interval], others: list[Interval]) -> int:
    """How long both are, of intervals as ``joined`` makes them."""
    total, i, j = 0, 0, 0
    while i < len(some) and j < len(others):
        total += max(0, min(some[i][1], others[j][1]) - max(some[i][0], others[j][0]))
        if some[i][1] <= others[j][1]:
            i += 1
        else:
            j += 1
    return total
