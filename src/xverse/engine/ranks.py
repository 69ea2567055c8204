"""The processes of tensor parallelism: rank 0 starts the others and gives them orders; all of them compute.

Collectives run over NCCL on GPUs and over gloo on the CPU, orders over gloo. All processes are on one
machine.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xverse.device import compute_device
from xverse.launcher import end_with

_FOREVER = datetime.timedelta(days=3650)  # an idle process waits for its next order; a dead one is noticed
_HEADER = 512  # integers of an order that one message holds
_LOST_SECONDS = 10.0  # in which a process whose connection broke is found to have ended


class Ranks:
    """Process ``rank`` of ``count``, computing on ``device``. ``folder`` is where the processes meet."""

    def __init__(self, rank: int, count: int, device: torch.device, folder: Path) -> None:
        self.rank, self.count, self.device = rank, count, device
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.FileStore(str(folder / "store"), count),
            rank=rank,
            world_size=count,
            timeout=_FOREVER,
        )
        self._processes: list[subprocess.Popen[bytes]] = []

    @classmethod
    def start(cls, count: int, settings: dict[str, Any]) -> Ranks:
        """Rank 0, after it has started the other processes with ``settings`` of ``load_engine``.

        This process ends with one line as soon as one of them ends. They end with this one.
        """
        place = compute_device(settings["device"], 0)
        folder = Path(tempfile.mkdtemp(prefix="xverse-ranks-"))
        os.environ.setdefault("OMP_NUM_THREADS", str(settings["threads"]))
        processes = []
        for rank in range(1, count):
            order = json.dumps({"rank": rank, "count": count, "folder": str(folder), "settings": settings})
            with (folder / f"{rank}.log").open("wb") as log:
                command = [sys.executable, "-m", "xverse.engine.follower", order]
                processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        ending = threading.Event()
        for rank, process in enumerate(processes, 1):
            arguments = (rank, process, folder / f"{rank}.log", ending)
            threading.Thread(target=_watch, args=arguments, name=f"rank {rank}", daemon=True).start()

        def end() -> None:
            ending.set()
            for process in processes:
                process.kill()  # it has nothing to save
            shutil.rmtree(folder, ignore_errors=True)

        atexit.register(end)
        try:
            ranks = cls(0, count, place, folder)
        except BaseException:
            end()
            raise
        ranks._processes = processes
        ranks.end = end  # type: ignore[method-assign]
        return ranks

    def end(self) -> None:
        """Ends the processes that this one has started."""

    def close(self) -> None:
        """End the other processes; another engine can then be divided in this one."""
        self.end()
        dist.destroy_process_group()

    def total(self, x: Tensor) -> Tensor:
        """The sum of all processes' ``x`` in its dtype, computed in float32 on the CPU.

        There the order of the sum is that of the ranks, whatever the number of rows. gloo's own reduction
        sums pieces of the whole tensor in different orders.
        """
        if x.device.type == "cuda":
            with self._connected():
                dist.all_reduce(x)
            return x
        first, *others = self._all(x)
        result = first.float()
        for other in others:
            result = result + other
        return result.to(x.dtype)

    def joined(self, x: Tensor) -> Tensor:
        """All processes' ``x`` [..., K], of equal shapes, one after the other: [..., count · K]."""
        return torch.cat(self._all(x), dim=-1)

    def share(self, free: int) -> int:
        """Of ``free`` bytes what each process may use: the least of all GPUs, or its part of the memory."""
        share = free if self.device.type == "cuda" else free // self.count
        return min(int(part) for part in self._all(torch.tensor([share])))

    def from_first(self, x: Tensor) -> Tensor:
        """Rank 0's ``x``, in place."""
        with self._connected():
            dist.broadcast(x, 0)
        return x

    def order(self, values: list[int] | None = None) -> list[int]:
        """Send ``values`` to the other processes; they call it without values and get them."""
        count = 0 if values is None else len(values)
        head = torch.zeros(_HEADER, dtype=torch.long)
        if values is not None:
            head[0] = count
            head[1 : 1 + count] = torch.tensor(values[: _HEADER - 1], dtype=torch.long)
        self.from_first(head)
        count = int(head[0])
        if count < _HEADER:
            return head[1 : 1 + count].tolist()
        rest = torch.zeros(count - _HEADER + 1, dtype=torch.long)
        if values is not None:
            rest[:] = torch.tensor(values[_HEADER - 1 :])
        return [*head[1:].tolist(), *self.from_first(rest).tolist()]

    def _all(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.count)]
        with self._connected():
            dist.all_gather(parts, x.contiguous())
        return parts

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """A connection breaks because a process has ended: leave it to ``_watch`` to say which one."""
        try:
            yield
        except RuntimeError:
            end = time.monotonic() + _LOST_SECONDS
            while self._processes and time.monotonic() < end:
                time.sleep(0.1)
            raise


def ranks_of(model: nn.Module) -> Ranks | None:
    """The processes over which a model is divided."""
    ranks: Ranks | None = getattr(model, "ranks", None)
    return ranks


def join(rank: int, count: int, folder: Path, device: str) -> Ranks:
    """A process that rank 0 has started. It ignores the signals that end a terminal's or a service's
    processes together, because rank 0 answers open requests first, and ends with rank 0."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_with(os.getppid(), signal.SIGKILL)
    return Ranks(rank, count, compute_device(device, rank), folder)


def _watch(rank: int, process: subprocess.Popen[bytes], log: Path, ending: threading.Event) -> None:
    """End this process when another one has ended, although it may be waiting for it in a collective."""
    code = process.wait()
    if ending.is_set():
        return
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    with contextlib.suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        how += f": {lines[-1][:500]}" if lines else ""
    sys.stdout.flush()
    print(f"xverse: process {rank} of --tensor-parallel {how}", file=sys.stderr, flush=True)
    shutil.rmtree(log.parent, ignore_errors=True)
    os._exit(1)
