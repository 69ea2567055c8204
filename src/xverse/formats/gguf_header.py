"""The header of a GGUF file: its metadata, and where its tensors are.

Every count and offset is checked against the size of the file before it is used, so that a damaged or hostile
file is refused in one line.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from xverse.config import UserError
from xverse.formats.weights import GIT_LFS

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class StoredTensor:
    """``shape`` in PyTorch's order; ``kind`` is ggml's number of the type; ``data`` uint8 [bytes], mapped."""

    name: str
    shape: tuple[int, ...]
    kind: int
    data: NDArray[np.uint8]


@dataclass(frozen=True)
class Header:
    """``metadata`` by key; arrays are lists. ``tensors`` by ggml's name."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_header(path: Path) -> Header:
    """Read the header of ``path``. Raises UserError, naming the file, for anything that is not a whole GGUF
    file of version 2 or 3 in this machine's byte order."""
    try:
        data = np.memmap(path, dtype=np.uint8, mode="c")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    return _Reader(path, data).header()


class _Reader:
    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self._path, self._data, self._at = path, data, 0

    def header(self) -> Header:
        if bytes(self._data[:4]) != b"GGUF":
            pointer = bytes(self._data[: len(GIT_LFS)]) == GIT_LFS
            what = "a Git LFS pointer; run 'git lfs pull'" if pointer else "not a GGUF file"
            raise UserError(f"{self._path}: is {what}")
        self._at = 4
        version = self._scalar(4)
        if version and version % (1 << 16) == 0:
            raise UserError(f"{self._path}: is a big-endian GGUF file, which is not supported")
        if version not in (2, 3):
            raise UserError(f"{self._path}: GGUF version {version} is not supported, only 2 and 3")
        tensors, pairs = self._count(12), self._count(12)
        metadata = {}
        for _ in range(pairs):
            key = self._string()
            metadata[key] = self._value(self._scalar(4), key)
        if isinstance(parts := metadata.get("split.count"), int) and parts > 1:
            raise UserError(f"{self._path}: is one of {parts} parts; join them with llama-gguf-split --merge")
        infos = [self._info() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            self._damaged(f"alignment {alignment!r}")
        start = -(-self._at // alignment) * alignment
        stored = {}
        for name, shape, kind, offset in infos:
            size = tensor_bytes(kind, shape)
            if size is None:
                raise UserError(f"{self._path}: {name} has type {kind}, which is not supported")
            if name in stored:
                self._damaged(f"tensor '{name}' twice")
            if start + offset + size > len(self._data):
                self._damaged(f"'{name}' ends behind the end of the file; is it complete?")
            stored[name] = StoredTensor(name, shape, kind, self._data[start + offset : start + offset + size])
        return Header(metadata, stored)

    def _damaged(self, what: str) -> NoReturn:
        raise UserError(f"{self._path}: is damaged or incomplete ({what})")

    def _take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            self._damaged("its header ends early")
        self._at += size
        return self._data[self._at - size : self._at].tobytes()

    def _scalar(self, kind: int) -> Any:
        form = "<" + _SCALARS[kind]
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _count(self, least: int) -> int:
        """A number of things that take at least ``least`` bytes each."""
        count: int = self._scalar(10)
        if count * least > len(self._data):
            self._damaged(f"a count of {count}")
        return count

    def _string(self) -> str:
        return self._take(self._count(1)).decode("utf-8", errors="replace")

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._scalar(kind)
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            self._damaged(f"{key!r} has type {kind}")
        item = self._scalar(4)
        if item == _STRING:
            return [self._string() for _ in range(self._count(8))]
        if item not in _SCALARS:
            self._damaged(f"{key!r} is an array of type {item}")
        size = struct.calcsize("<" + _SCALARS[item])
        count = self._count(size)
        return np.frombuffer(self._take(count * size), "<" + _SCALARS[item]).tolist()

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._scalar(4)
        if not name.isprintable():
            self._damaged(f"a tensor named {name[:64]!r}")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            self._damaged(f"'{name}' has {dimensions} dimensions")
        shape = tuple(reversed([self._scalar(10) for _ in range(dimensions)]))
        return name, shape, self._scalar(4), self._scalar(10)


def tensor_bytes(kind: int, shape: tuple[int, ...]) -> int | None:
    """The size of a tensor of ggml's type ``kind``, or None for a type or shape that it cannot have."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        return None
    return None if shape[-1] % block else math.prod(shape) // block * size
