"""The GPUs that a run can be planned for, and their machines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from xverse.config import UserError, build, choose, read_yaml
from xverse.hardware import Peaks, device_peaks

Generation = Literal["ampere", "hopper", "blackwell"]
Kernel = Literal["unfused", "flash1", "flash2", "flash3"]

# Share of the device's peak that attention kernels reach, forward and backward together, on causal FLOPs.
# FlashAttention: 25-40 % of an A100; FlashAttention-2: 50-73 % there, 35 % of an H100; FlashAttention-3: up
# to 75 % of an H100 (abstracts and introductions of arXiv:2307.08691 and 2407.08608). Used here: about the
# middle of each range; for FlashAttention on Hopper half of FlashAttention-2. Blackwell is a guess.
ATTENTION: dict[Kernel, dict[Generation, float]] = {
    "flash1": {"ampere": 0.33, "hopper": 0.18, "blackwell": 0.12},
    "flash2": {"ampere": 0.58, "hopper": 0.35, "blackwell": 0.25},
    "flash3": {"ampere": 0.58, "hopper": 0.60, "blackwell": 0.55},
}


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU in its machine. Rates are in FLOP/s and bytes/s; those of links count one direction.

    ``network`` is one GPU's share of its machine's links to other machines; ``processors`` are streaming
    multiprocessors, over which the tiles of a matrix product are distributed. ``link_latency`` and
    ``network_latency`` are the seconds of one hop in a collective, as NCCL's cost model has them for rings
    (its ``tuning.cc``, protocol Simple, versions 2.18 to 2.23).
    """

    name: str
    generation: Generation
    flops: float
    bandwidth: float
    memory: float
    link: float
    network: float
    gpus_per_machine: int = 8
    processors: int = 132
    attention: Kernel = "flash2"
    link_latency: float = 3.4e-6
    network_latency: float = 14e-6

    def __post_init__(self) -> None:
        for key, value in dataclasses.asdict(self).items():
            number = isinstance(value, (int, float))
            if number and not (0 < value < math.inf) and not key.endswith("latency"):
                raise ValueError(f"{key} must be positive, not {value}")

    @property
    def attention_share(self) -> float:
        """Share of the peak that the attention kernel reaches."""
        return ATTENTION[self.attention][self.generation]


def _device(driver_name: str, **rest: Any) -> Device:
    peaks = device_peaks(driver_name)
    assert isinstance(peaks, Peaks)
    return Device(flops=peaks.bf16_flops, bandwidth=peaks.bandwidth, **rest)


# NVLink: 600 GB/s in both directions together for A100, 400 for A800, 900 for H100 and H200, 1,800 for B200.
# The network is an assumption, which a flag overrides: eight 200 Gb/s adapters in a machine of A100 or A800,
# eight of 400 Gb/s in the others.
DEVICES: dict[str, Device] = {
    "a100": _device(
        "A100-SXM4-80GB", name="A100 80 GB", generation="ampere", memory=80e9, link=300e9, network=25e9,
        processors=108,
    ),
    "a800": _device(
        "A800-SXM4-80GB", name="A800 80 GB", generation="ampere", memory=80e9, link=200e9, network=25e9,
        processors=108,
    ),
    "h100": _device(
        "H100 80GB HBM3", name="H100 80 GB", generation="hopper", memory=80e9, link=450e9, network=50e9,
    ),
    "h200": _device("H200", name="H200", generation="hopper", memory=141e9, link=450e9, network=50e9),
    "b200": _device(
        "B200", name="B200", generation="blackwell", memory=180e9, link=900e9, network=50e9, processors=148,
    ),
}  # fmt: skip


def find_device(name: str, **changes: float | None) -> Device:
    """A known device, or that of a YAML file with the keys of ``Device``; ``changes`` replace its values.

    A file may name a known device under ``like`` and give only what differs. Raises UserError for
    an unknown name, key or impossible value.
    """
    overrides: Mapping[str, Any] = {key: value for key, value in changes.items() if value is not None}
    if name.endswith((".yaml", ".yml")):
        values = read_yaml(name)
        base = values.pop("like", None)
        values.setdefault("name", Path(name).stem)
        if base is not None:
            known = dataclasses.asdict(choose("device", str(base), DEVICES))
            values = {**known, **values}
        return build(Device, {**values, **overrides}, name)
    device = choose("device", name, DEVICES)
    try:
        return dataclasses.replace(device, **overrides)
    except ValueError as error:
        raise UserError(f"device {name}: {error}") from None
