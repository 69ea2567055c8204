"""The check before the first step: how fast each process is, and which are slower than the others."""

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
SECONDS = 0.15  # at least, of each measurement
MEASURES = {"matmul": "FLOP/s", "memory": "B/s", "exchange": "B/s"}


class SlowProcess(UserError):
    """A process is slower than the others; the scheduler should replace its node."""

    exit_code = EXIT_SLOW


@dataclass(frozen=True)
class Reading:
    """What one process measured: ``matmul`` in FLOP/s in the run's dtype, ``memory`` in bytes/s read,
    ``exchange`` in bytes/s to and from the faster of its two neighbours (0 without neighbours)."""

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
    sides = (8192, 8192, 8192) if gpu else (256, 1024, 1024)
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
    reading = Reading(world.rank, socket.gethostname(), device, matmul, memory, exchange)
    return [Reading(**values) for values in world.gathered(asdict(reading))], all_reduce


def slow(readings: list[Reading], share: float) -> list[str]:
    """One line for each process and measure below ``share`` of the median."""
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
    """Measure, print the figures and name slow processes; returns the figures for the records.

    Raises SlowProcess in all processes if one is slow and ``mode`` is "stop".
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
        raise SlowProcess(f"pre-flight check: {'; '.join(lines)}; remove it, or set train.preflight: warn")
    for line in lines:
        world.say(f"WARNING: pre-flight check: {line}")
    return {"readings": [asdict(reading) for reading in readings], "all_reduce": all_reduce, "slow": lines}


def _neighbours(world: World) -> list[int]:
    """This process's partners in two rounds of disjoint pairs; -1 for none.

    A slow process slows its partners too, but each of them has another partner, whose figure counts.
    """
    if world.size == 1:
        return []
    even = world.rank % 2 == 0
    pairs = [world.rank + (1 if even else -1), world.rank + (-1 if even else 1)]
    return [other if 0 <= other < world.size else -1 for other in pairs]


def _exchange(message: torch.Tensor, other: int, world: World) -> float:
    """Bytes per second, both directions together, with rank ``other`` (0 if negative). Collective."""
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
