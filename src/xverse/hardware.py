"""This machine's cores, memory, instruction sets, GPUs and measured bounds; the only reader of /proc.

Every speed figure is printed next to its bound, and the bounds come from here. Functions that need torch
import it themselves, so that importing this module is fast.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xverse.config import UserError

if TYPE_CHECKING:
    import torch

# ---------------------------------------------------------------------------------------------------------
# Vendors' peaks


@dataclass(frozen=True)
class Peaks:
    """A device's peaks as stated by its vendor: dense bf16 FLOP/s, memory bytes/s, and dense FP8 FLOP/s if it
    has FP8."""

    bf16_flops: float
    bandwidth: float
    fp8_flops: float | None = None


_PEAKS = (  # by the driver's name; the first match counts
    (r"A100 80GB PCIe", Peaks(312e12, 1935e9)),
    (r"A100-SXM4-80GB", Peaks(312e12, 2039e9)),
    (r"A100-(SXM4|PCIE)-40GB", Peaks(312e12, 1555e9)),
    (r"A800 80GB PCIe", Peaks(312e12, 1935e9)),
    (r"A800-SXM4-80GB", Peaks(312e12, 2039e9)),
    (r"H100 NVL", Peaks(835e12, 3900e9, 1671e12)),
    (r"H100 PCIe", Peaks(756e12, 2000e9, 1513e12)),
    (r"H100 80GB HBM3", Peaks(989e12, 3350e9, 1979e12)),
    (r"H200 NVL", Peaks(835e12, 4800e9, 1671e12)),
    (r"H200", Peaks(989e12, 4800e9, 1979e12)),
    (r"B200", Peaks(2250e12, 7700e9, 4500e12)),
)


def device_peaks(name: str) -> Peaks | None:
    """Peaks of the whole GPU with the driver's ``name``, or None (a share of an unknown peak prints
    "unknown").

    Sources: NVIDIA's published figures as quoted by others, not checked in the data sheets; half of figures
    "with sparsity".

    - A100: 312 TFLOP/s; 1,555 GB/s (40 GB), 1,935 (80 GB PCIe), 2,039 (80 GB SXM). Several tables agree.
    - A800: an A100 with slower NVLink. Tables give 312 TFLOP/s, and 2,039 GB/s for SXM; that PCIe has the
      A100's 1,935 is inferred.
    - H100: 1,979 (SXM), 1,513 (PCIe) and 1,671 TFLOP/s (NVL) with sparsity; 3.35, 2 and 3.9 TB/s. NVIDIA's
      product brief of the PCIe card says "greater than 2,000" GB/s; NVL was announced with 1,980.
    - H200: SXM as H100 SXM, with 4.8 TB/s, and NVL the same bandwidth. That NVL computes as H100 NVL is
      inferred.
    - B200: 4.5 PFLOP/s with sparsity and 7.7 TB/s, from NVIDIA's HGX B200 table. Its DGX B200 page says
      64 TB/s for eight; drivers report a bus of 7,680 bits at 3,996 MHz, which is 7.67.
    - FP8: twice the bf16 figure in these tables, for Hopper and Blackwell alike.
    """
    for pattern, peaks in _PEAKS:
        if re.fullmatch(rf"(NVIDIA )?{pattern}", name):
            return peaks
    return None


def share(value: float, peak: float | None) -> str:
    """``value`` as a percentage of ``peak``; "unknown" without a finite, positive peak."""
    if peak is None or not math.isfinite(peak) or peak <= 0:
        return "unknown"
    return f"{100 * value / peak:.0f} %"


# ---------------------------------------------------------------------------------------------------------
# CPU and memory

# In the spelling of /proc/cpuinfo: x86 first, then Arm (asimd is NEON).
_INSTRUCTION_SETS = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)


@dataclass(frozen=True)
class Cores:
    """Processor cores: those of the machine, and how many this process may use."""

    machine: int
    affinity: int
    quota: float | None  # from the control group; None: unlimited

    @property
    def usable(self) -> int:
        return max(1, min(self.affinity, math.ceil(self.quota) if self.quota else self.affinity))


def cores() -> Cores:
    """Cores by affinity mask and control-group quota; outside Linux all cores of the machine."""
    machine = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    return Cores(machine, affinity, _cpu_quota())


def cpu_model() -> str:
    """The processor's marketing name if the system reports it."""
    if name := _field("/proc/cpuinfo", "model name", "Model", "Processor"):
        return name
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """SIMD instruction sets relevant to matrix products, in the spelling of /proc/cpuinfo; [] if unknown."""
    flags = set(_field("/proc/cpuinfo", "flags", "Features").split())
    return [name for name in _INSTRUCTION_SETS if name in flags]


def memory() -> tuple[int, int | None]:
    """(bytes of RAM that this process may use, bytes available now or None where it is not reported)."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = _memory_limit()
    available = _bytes("/proc/meminfo", "MemAvailable")
    if limit is not None and limit < total:
        total = limit
        available = min(available, limit - used) if available is not None else limit - used
    return total, available


def process_memory(key: str, pid: int | None = None) -> int | None:
    """Bytes of ``VmRSS`` (now), ``VmHWM`` (peak) or ``VmSize`` (address space) of a process, by default this
    one; None without /proc or once the process has ended.

    getrusage would not do: its peak starts with the parent's, from before exec.
    """
    return _bytes(f"/proc/{pid or 'self'}/status", key)


def process_seconds(pid: int) -> float | None:
    """CPU seconds, user and system, that a process has used; None without /proc or once it has ended."""
    fields = _read(f"/proc/{pid}/stat").rpartition(") ")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK") if fields else None


def resident_memory(device: torch.device) -> int | None:
    """Bytes that this process holds now: allocated on a CUDA ``device``, otherwise resident (None without
    /proc)."""
    if device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    return process_memory("VmRSS")


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Bytes: the most that was allocated on a CUDA ``device``, otherwise this process's peak resident memory
    (libraries included)."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return process_memory("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device | str = "cpu") -> None:
    """Start ``peak_memory`` anew. For the CPU only Linux can."""
    if str(device).startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def total_memory(device: torch.device) -> int:
    """Bytes of memory of a CUDA ``device``."""
    import torch

    return torch.cuda.mem_get_info(device)[1]


def available_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that this process may still take: free memory of a CUDA or Apple ``device``, otherwise its share
    of the RAM available to all processes that a launcher started here (all RAM where that is unknown)."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    if str(device).startswith("mps"):
        import torch

        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    total, available = memory()
    launched = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # torchrun; DeepSpeed
    return (total if available is None else available) // int(launched or 1)


def file_mapped(start: int, end: int) -> bool:
    """Whether the addresses from ``start`` to ``end`` of this process lie in one mapping of a file."""
    for line in _read("/proc/self/maps").splitlines():
        fields = line.split(maxsplit=5)
        low, high = (int(part, 16) for part in fields[0].split("-"))
        if low <= start and end <= high:
            return fields[4] != "0" and len(fields) == 6 and fields[5].startswith("/")
    return False


def last_level_cache() -> int:
    """Bytes of last-level cache, all instances together; 0 if the system does not report it."""
    total = 0
    for level in (2, 3, 4):
        instances: dict[str, int] = {}
        for index in Path("/sys/devices/system/cpu").glob(f"cpu[0-9]*/cache/index{level}"):
            size = _read(index / "size").strip()  # such as 32768K
            if size.endswith("K"):
                instances[_read(index / "shared_cpu_list").strip()] = int(size[:-1]) * 1024
        total = sum(instances.values()) or total
    return total


def _cgroups() -> list[Path]:
    """This process's control group and its ancestors, innermost first (version 2)."""
    for line in _read("/proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            root = Path("/sys/fs/cgroup")
            path = root / line[3:].lstrip("/")
            return [path, *(parent for parent in path.parents if parent.is_relative_to(root))]
    return []


def _cpu_quota() -> float | None:
    quotas = []
    for group in _cgroups():
        fields = _read(group / "cpu.max").split()
        if len(fields) == 2 and fields[0] != "max":
            quotas.append(int(fields[0]) / int(fields[1]))
    quota, period = (_read(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    if quota.isdigit() and period.isdigit():  # "-1" is unlimited
        quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _memory_limit() -> tuple[int | None, int]:
    """(the tightest memory limit of the control groups or None, bytes used in that group)."""
    files = [(group / "memory.max", group / "memory.current") for group in _cgroups()]
    version1 = Path("/sys/fs/cgroup/memory")
    files.append((version1 / "memory.limit_in_bytes", version1 / "memory.usage_in_bytes"))
    limits = []
    for limit_file, used_file in files:
        limit = _read(limit_file).strip()
        if limit.isdigit():
            limits.append((int(limit), int(_read(used_file).strip() or 0)))
    return min(limits, default=(None, 0))


def _field(path: str, *keys: str) -> str:
    """The value of the first line ``key: value`` in a file with one of ``keys``, or an empty string."""
    for line in _read(path).splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _bytes(path: str, key: str) -> int | None:
    value = _field(path, key)  # such as 1024 kB
    return int(value.split()[0]) * 1024 if value else None


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


# ---------------------------------------------------------------------------------------------------------
# Measurements


@contextlib.contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Set PyTorch's CPU threads inside the block. Raises UserError for a count out of range."""
    if not 1 <= count <= 1024:
        raise UserError(f"threads: {count} is out of range (1 to 1024)")
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bandwidth_buffer(device: str = "cpu") -> torch.Tensor:
    """A float32 tensor [n], much larger than any cache, with every page touched.

    It has 512 MiB, or four times the last-level cache if that is more, but at most an eighth of free memory.
    """
    import torch

    size = max(512 * 2**20, 4 * last_level_cache())
    available = memory()[1]
    if device == "cpu" and available is not None:
        size = min(size, max(16 * 2**20, available // 8))
    if device != "cpu":
        size = 2**31
    return torch.ones(size // 4, dtype=torch.float32, device=device)  # [n]


def read_bandwidth(
    buffer: torch.Tensor, threads: int | None = None, seconds: float = 0.4, best: bool = False
) -> float:
    """Bytes per second at which ``buffer`` [n] float32 is read, by a sum over it with ``threads`` threads;
    the mean, or the ``best`` of the calls.

    The speed of a machine's memory can change by almost a factor of two within seconds: sample right before
    and after what the figure is compared with.
    """
    import torch

    with using_threads(threads or torch.get_num_threads()):
        elapsed = _time_each(buffer.sum, buffer.device.type, seconds, best)
    return buffer.numel() * buffer.element_size() / elapsed


def matmul_flops(
    dtype: torch.dtype,
    rows: int,
    inner: int,
    columns: int,
    device: torch.device | str = "cpu",
    seconds: float = 0.5,
    best: bool = False,
) -> float:
    """FLOP/s of ``[rows, inner] @ [inner, columns]`` in ``dtype``, with torch's current number of threads;
    the mean, or the ``best`` of the calls."""
    import torch

    left = torch.randn(rows, inner, device=device).to(dtype)  # [rows, inner]
    right = torch.randn(inner, columns, device=device).to(dtype)  # [inner, columns]
    out = torch.empty(rows, columns, dtype=dtype, device=device)  # [rows, columns]
    few, begin = -(-rows // 256), time.perf_counter()
    torch.matmul(left[:few], right, out=out[:few])
    if str(device) == "cpu" and (spent := time.perf_counter() - begin) > 0.5:  # no hardware for bfloat16
        return 2 * few * inner * columns / spent
    elapsed = _time_each(lambda: torch.matmul(left, right, out=out), str(device), seconds, best)
    return 2 * rows * inner * columns / elapsed


def _time_each(action: Callable[[], Any], device: str, seconds: float, best: bool) -> float:
    """Seconds of one call, after one call to warm up, over at least ``seconds``: the mean, or the ``best`` of
    at least five, which a short disturbance does not change."""
    import torch

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    action()
    wait()
    count, batch, start = 0, 1, time.perf_counter()
    shortest, last = math.inf, start
    while best:
        action()
        wait()
        now = time.perf_counter()
        shortest, last, count = min(shortest, now - last), now, count + 1
        if count >= 5 and now - start >= seconds:
            return shortest
    while True:
        for _ in range(batch):
            action()
        wait()
        count += batch
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return elapsed / count
        batch = min(2 * batch, 64)  # synchronising after each call would measure launches on a fast device


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8  # malloc.h


def keep_freed_memory() -> None:
    """Make glibc keep freed memory: a training step frees and allocates the same large blocks again, and each
    4 KiB of fresh memory costs a page fault (11 % of a step of ``mini``)."""
    _mallopt({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1})


def return_freed_memory() -> None:
    """Make glibc return each large block to the system when it is freed, at the cost of page faults, so that
    only live memory is resident. Kept blocks leave holes that later sizes do not fit (7 GB beside 6 GB of
    QLoRA at 7B), depending on the matmul buffers of the processor."""
    _mallopt({_M_MMAP_MAX: 65536, _M_MMAP_THRESHOLD: 2**20, _M_TRIM_THRESHOLD: 2**22})


def share_arenas() -> None:
    """Make the threads of a server share two of glibc's arenas. Each arena keeps the most that was ever
    allocated in it; with one for each thread the sum grows as long as large requests meet other threads."""
    _mallopt({_M_ARENA_MAX: 2})


def trim_freed_memory() -> None:
    """Give the pages of freed blocks back to the system, those between live blocks included."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt(values: dict[int, int]) -> None:
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for option, value in values.items():
            library.mallopt(option, value)
