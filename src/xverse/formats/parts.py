"""Which file of a checkpoint holds which part of which tensor.

The header of each file lists its parts. In 1,024 files at 7B that is 250 MB of JSON, half a minute's work for
a process that reads them all; so each process reads its share and sends the others a compact form.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from xverse.formats import weights

SHARD = "shard-"  # the tensors' files begin with it
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DIMENSIONS = 2  # the most that a tensor of the model or optimizer has


def read_header(file: Path) -> bytes:
    """A compact form of a checkpoint file's header: each tensor's dtype, name and place in the whole tensor.

    Raises ValueError for another kind of file.
    """
    header, _ = weights.read_header(file)
    custom = header.pop("__metadata__", {}).get("DCP_SHARDING_INFO")
    offsets = json.loads(custom) if custom else {}
    names, boxes = [], []
    for name, entry in sorted(header.items()):
        shape = entry["shape"]
        begins = offsets[name]["saved_offsets"] if offsets else [0] * len(shape)
        if len(shape) > _DIMENSIONS or entry["dtype"] not in _DTYPES:
            raise ValueError(f"'{name}' is {entry['dtype']} {shape}")
        missing = _DIMENSIONS - len(shape)
        names.append(f"{entry['dtype']} {len(shape)} {name}")
        boxes.append([*begins, *[0] * missing, *shape, *[1] * missing])
    packed = "\n".join(names).encode()
    places = np.array(boxes, "<i8").tobytes()
    return zlib.compress(len(packed).to_bytes(8, "little") + packed + places, level=1)


@dataclass(frozen=True)
class Part:
    """A part of a tensor in a file: its offset in the whole tensor, and its shape."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class Index:
    """The parts of all tensors, from ``files`` and the ``read_header`` of each."""

    def __init__(self, files: Sequence[str], headers: Sequence[bytes]) -> None:
        self._files = files
        alike: dict[bytes, tuple[list[int], list[NDArray[np.int64]]]] = {}  # by equal lists of tensors
        for number, header in enumerate(headers):
            data = zlib.decompress(header)
            size = int.from_bytes(data[:8], "little")
            numbers, boxes = alike.setdefault(data[8 : 8 + size], ([], []))
            numbers.append(number)
            boxes.append(np.frombuffer(data[8 + size :], "<i8").reshape(-1, 2, _DIMENSIONS))
        self._places: dict[str, list[tuple[NDArray[np.int64], NDArray[np.int64]]]] = {}
        self._kinds: dict[str, tuple[torch.dtype, int]] = {}
        for packed, (numbers, boxes) in alike.items():
            together = np.stack(boxes)  # [files, tensors, 2, dimensions]
            for place, line in enumerate(packed.decode().split("\n")):
                dtype, dimensions, name = line.split(" ", 2)
                self._kinds[name] = _DTYPES[dtype], int(dimensions)
                self._places.setdefault(name, []).append((np.array(numbers), together[:, place]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def dtype(self, name: str) -> torch.dtype:
        return self._kinds[name][0]

    def shape(self, name: str) -> torch.Size:
        """Shape of the whole tensor."""
        ends = np.max([boxes.sum(1).max(0) for _, boxes in self._places[name]], axis=0)
        return torch.Size(ends[: self._kinds[name][1]].tolist())

    def parts(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> list[Part]:
        """The parts that overlap the box of ``shape`` at ``offset``."""
        if 0 in shape:
            return []
        dimensions = self._kinds[name][1]
        begins, sizes = np.array(offset, np.int64), np.array(shape, np.int64)
        overlapping = []
        for numbers, boxes in self._places[name]:
            starts, extents = boxes[:, 0, :dimensions], boxes[:, 1, :dimensions]
            meets = np.all((starts < begins + sizes) & (begins < starts + extents), axis=1)
            for i in np.flatnonzero(meets):
                overlapping.append(
                    Part(self._files[numbers[i]], tuple(starts[i].tolist()), tuple(extents[i].tolist()))
                )
        return overlapping
