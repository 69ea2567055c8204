"""Before the first step: what each process reaches, and which of them is slower than the others."""

from __future__ import annotations

import socket
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from xverse import hardware
from xverse.config import UserError
from xverse.train.parallel import World

EXIT_SLOW = 69  # EX_UNAVAILABLE of sysexits.h
SECONDS = 0.15  # of each measurement, after one call to warm up
MEASURES = {"matmul": "FLOP/s", "memory": "B/s", "exchange": "B/s"}


class SlowProcess(UserError):
    """A process is slower than the others; the scheduler is to replace its node."""

    exit_code = EXIT_SLOW


@dataclass(frozen=True)
class Reading:
    """What one process reached: ``matmul`` in FLOP/s in the dtype of the run, ``memory`` in bytes/s read,
    ``exchange`` in bytes/s to and from the better of its two neighbours (0 where it is alone)."""

    rank: int
    host: str
    device: str
    matmul: float
    memory: float
    exchange: float

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.host}, {self.device})"


def measure(world: World, dtype: str) -> tuple[list[Reading], float]:
    """The readings of all processes, by rank, and the seconds of one all-reduce of 16 MiB (256 on a GPU).
    Every process calls it."""
    gpu = world.device.type == "cuda"
    sides = (8192, 8192, 8192) if gpu else (512, 2048, 2048)
    world.wait()
    matmul = hardware.matmul_flops(getattr(torch, dtype), *sides, world.device, SECONDS, best=True)
    buffer = torch.ones((2**31 if gpu else 2**27) // 4, device=world.device)
    world.wait()
    memory = hardware.read_bandwidth(buffer, seconds=SECONDS, best=True)
    message = buffer[: (2**28 if gpu else 2**24) // 4].clone()
    exchange = max((_exchange(message, other, world) for other in _neighbours(world)), default=0.0)
    start = time.perf_counter()
    if world.size > 1:
        world.wait()
        start = time.perf_counter()
        dist.all_reduce(message)
        _settle(world.device)
    all_reduce = time.perf_counter() - start if world.size > 1 else 0.0
    device = torch.cuda.get_device_name(world.device) if gpu else "CPU"
    mine = Reading(world.rank, socket.gethostname(), device, matmul, memory, exchange)
    return [Reading(**values) for values in world.gathered(asdict(mine))], all_reduce


def slow(readings: list[Reading], share: float) -> list[str]:
    """Which processes reach less than ``share`` of the median of all, and of what; one line each."""
    lines = []
    for measure_, unit in MEASURES.items():
        middle = statistics.median(getattr(reading, measure_) for reading in readings)
        for reading in readings:
            value = getattr(reading, measure_)
            if value < share * middle:
                lines.append(
                    f"{reading.name}: {measure_} {_short(value, unit)}, "
                    f"{100 * value / middle:.0f} % of the median {_short(middle, unit)}"
                )
    return lines


def check(world: World, mode: str, share: float, dtype: str) -> dict[str, Any]:
    """Measure, say it, and name what is slow; returns what was found, for the records.

    Raises SlowProcess in all processes where one is slow and ``mode`` is "stop".
    """
    start = time.perf_counter()
    readings, all_reduce = measure(world, dtype)
    fastest = [max(getattr(reading, name) for reading in readings) for name in MEASURES]
    slowest = [min(getattr(reading, name) for reading in readings) for name in MEASURES]
    figures = ", ".join(
        f"{name} {_short(least, unit)}" + (f" to {_short(most, unit)}" if len(readings) > 1 else "")
        for (name, unit), least, most in zip(MEASURES.items(), slowest, fastest, strict=True)
        if most
    )
    world.say(f"pre-flight check ({time.perf_counter() - start:.1f} s): {figures}")
    lines = slow(readings, share)
    if lines and mode == "stop":
        raise SlowProcess(f"pre-flight check: {'; '.join(lines)}; take it out, or set train.preflight: warn")
    for line in lines:
        world.say(f"WARNING: pre-flight check: {line}")
    return {"readings": [asdict(reading) for reading in readings], "all_reduce": all_reduce, "slow": lines}


def _neighbours(world: World) -> list[int]:
    """With whom this process exchanges, in the two rounds in which all pairs are apart; -1 for nobody.

    A process slows its partners too, but each of these has another neighbour, whose figure counts.
    """
    if world.size == 1:
        return []
    even = world.rank % 2 == 0
    pairs = [world.rank + (1 if even else -1), world.rank + (-1 if even else 1)]
    return [other if 0 <= other < world.size else -1 for other in pairs]


def _exchange(message: torch.Tensor, other: int, world: World) -> float:
    """Bytes a second, both ways together, with process ``other``; 0 without one. All processes call it."""
    world.wait()
    if other < 0:
        return 0.0
    into = torch.empty_like(message)
    first, second = (dist.send, dist.recv) if world.rank < other else (dist.recv, dist.send)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for call in (first, second):
            call(message if call is dist.send else into, other)
        _settle(world.device)
        best = min(best, time.perf_counter() - start)
    return 2 * message.numel() * message.element_size() / best


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _short(value: float, unit: str) -> str:
    scale, letter = (1e12, "T") if value >= 1e12 else (1e9, "G")
    return f"{value / scale:.3g} {letter}{unit}"
