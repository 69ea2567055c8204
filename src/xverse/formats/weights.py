"""Weight files: which file holds which tensor, memory-mapped reading, and streaming safetensors writing.

The safetensors layout is 8 bytes of header length, a JSON header, then the tensors' bytes one after another
(https://github.com/huggingface/safetensors#format). It is written here by hand because the library takes
whole shards: tensor by tensor, a conversion never holds more than one converted tensor.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xverse.config import UserError
from xverse.texts import read_object

HEAD = "lm_head.weight"
SAFETENSORS = "model.safetensors"
PYTORCH = "pytorch_model.bin"
# Precomputed rotary frequencies in published files; the model computes them.
IGNORED_SUFFIX = "rotary_emb.inv_freq"
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # torch's name → safetensors' name
GIT_LFS = b"version https://git-lfs"
GPTQ_FILE = "gptq_model-*bit-*g"  # what AutoGPTQ calls its single file

_STORED = {
    **{getattr(torch, name): code for name, code in DTYPES.items()},
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_READABLE = {
    **{code: dtype for dtype, code in _STORED.items()},
    "F64": torch.float64,
    "I16": torch.int16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_HEADER_BYTES_PER_TENSOR = 192


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` → ``bfloat16``, as ``config.json`` writes it."""
    return str(dtype).removeprefix("torch.")


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a model directory in the index's order; safetensors take precedence over ``.bin``.

    Raises UserError for a directory without weights and for an index that names a missing file.
    """
    for name in (SAFETENSORS, PYTORCH):
        index = directory / f"{name}.index.json"
        if index.exists():
            return _indexed(index)
        if (directory / name).exists():
            return [directory / name]
    for suffix in (".safetensors", ".bin"):
        if named := sorted(directory.glob(GPTQ_FILE + suffix)):
            return named[:1]
    shards = sorted(path.name for path in directory.glob("*-of-*") if path.suffix in (".safetensors", ".bin"))
    if shards:
        raise UserError(f"{directory}: has {len(shards)} weight shards ({shards[0]} …) but no *.index.json")
    raise UserError(f"{directory}: has no weights ({SAFETENSORS} or {PYTORCH}, single or sharded)")


def _indexed(index: Path) -> list[Path]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map")
    names = list(dict.fromkeys(str(name) for name in weight_map.values()))
    for name in names:
        if Path(name).name != name:  # an index must not reach outside its directory
            raise UserError(f"{index}: '{name}' is not a file name")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(f"{index}: names {listed(missing)}, which the directory does not have")
    return [index.parent / name for name in names]


def misfit(tensor: Tensor, shape: Sequence[int]) -> str:
    """How a stored tensor differs from the one of ``shape`` that the model needs; empty if it fits."""
    if tuple(tensor.shape) != tuple(shape):
        stored, needed = ("×".join(map(str, sizes)) for sizes in (tensor.shape, shape))
        return f"is {stored} where the settings say {needed}"
    if dtype_name(tensor.dtype) not in DTYPES:
        return f"is stored as {dtype_name(tensor.dtype)}, not as one of {', '.join(DTYPES)}"
    return ""


def check_tensors(
    path: Path, missing: Sequence[str] = (), unexpected: Sequence[str] = (), wrong: Mapping[str, str] = {}
) -> None:
    """Raise UserError if there are any; ``wrong`` maps names to what is wrong with them."""
    if "score.weight" in unexpected:
        raise UserError(
            f"{path}: is a reward model, which scores texts and writes none; reward_funcs takes it"
        )
    parts = []
    if missing:
        tied = " (is the head tied? the settings say that it is not)" if HEAD in missing else ""
        parts.append(f"missing {listed(missing)}{tied}")
    if unexpected:
        parts.append(f"unexpected {listed(unexpected)}")
    if wrong:
        parts.append(listed(f"{name} {what}" for name, what in wrong.items()))
    if parts:
        settings = "its metadata" if path.suffix == ".gguf" else "config.json"
        raise UserError(f"{path}: the weights do not fit {settings}: {'; '.join(parts)}")


def listed(names: Iterable[str], limit: int = 4) -> str:
    """``a, b, c, d and 7 more``."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the tensors of one weight file, on the CPU in their stored dtype, as ``TensorFiles``."""
    files = TensorFiles([path])
    for name in files.names:
        yield name, files.get(name)


@dataclass(frozen=True)
class _Place:
    """The location of a tensor in its file, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, with ``__metadata__``, and the offset of its data in bytes.

    Raises ValueError for another kind of file.
    """
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        return json.loads(opened.read(size)), 8 + size


def _read_places(file: Path) -> dict[str, _Place]:
    """The tensors in a valid safetensors file. The library would parse the header for each tensor anew, which
    takes half a second in all at 7B."""
    header, start = read_header(file)
    places = {}
    for name, entry in header.items():
        dtype = _READABLE.get(entry.get("dtype"))
        if name != "__metadata__" and dtype is not None:
            begin, end = (start + offset for offset in entry["data_offsets"])
            places[name] = _Place(dtype, tuple(entry["shape"]), begin, end)
    return places


class TensorFiles:
    """The tensors of weight files by name, each on its own mapping, released with the tensor.

    A model of any size can be read in any order with one tensor resident at a time. Of ``.bin`` shards the
    last one used stays mapped. Raises UserError for a truncated file, another format, a pickle that holds
    more than tensors, and a name that two files hold.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._home: dict[str, Path] = {}
        self._places: dict[str, _Place] = {}
        self._pickle: tuple[Path, dict[str, Tensor]] | None = None
        for file in files:
            for name in self._names(file):
                if name in self._home:
                    raise UserError(f"{file}: holds '{name}', and so does {self._home[name].name}")
                self._home[name] = file

    @property
    def names(self) -> list[str]:
        return list(self._home)

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def get(self, name: str) -> Tensor:
        """One tensor in its stored dtype."""
        file = self._home[name]
        if file.suffix != ".safetensors":
            return self._unpickled(file)[name]
        if name not in self._places:
            raise UserError(f"{file}: '{name}' has a dtype that is not supported")
        place = self._places[name]
        if place.end == place.begin:
            return torch.empty(place.shape, dtype=place.dtype)
        base = place.begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        try:
            with file.open("rb") as opened:
                size = place.end - base  # the tensor keeps the mapping alive
                mapped = mmap.mmap(opened.fileno(), size, offset=base, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            _unreadable(file, error)
        flat = torch.frombuffer(
            mapped, dtype=place.dtype, offset=place.begin - base, count=math.prod(place.shape)
        )
        return flat.view(place.shape)

    def read(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with ``prefix``."""
        return {name: self.get(name) for name in self._home if name.startswith(prefix)}

    def _names(self, file: Path) -> list[str]:
        if file.suffix != ".safetensors":
            return list(self._unpickled(file))
        try:
            with safe_open(file, framework="pt") as opened:  # checks the header against the file size
                names = list(opened.keys())
            self._places |= _read_places(file)
        except (SafetensorError, OSError) as error:
            _unreadable(file, error)
        return names

    def _unpickled(self, file: Path) -> dict[str, Tensor]:
        if self._pickle is None or self._pickle[0] != file:
            self._pickle = (file, _read_pickle(file))
        return self._pickle[1]


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "_use_new_zipfile_serialization" not in str(error):
                raise
            # A file from before PyTorch 1.6, which cannot be mapped.
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the unpickler can raise anything for an invalid file
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise UserError(f"{path}: holds more than tensors; code in weight files is never run") from None
        _unreadable(path, error)
    if not isinstance(tensors, dict):
        raise UserError(f"{path}: expected a mapping of names to tensors, found {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path}: '{name}' is not a tensor but {type(tensor).__name__}")
    return tensors


def _unreadable(path: Path, error: Exception) -> NoReturn:
    with path.open("rb") as file:
        start = file.read(len(GIT_LFS))
    if start == GIT_LFS:
        raise UserError(f"{path}: is a Git LFS pointer, not weights; run 'git lfs pull'") from None
    reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
    raise UserError(
        f"{path}: cannot be read, probably truncated ({path.stat().st_size:,} bytes); "
        f"fetch it again ({reason[:120]})"
    ) from None


class SafetensorsWriter:
    """Writes tensors of any of the stored dtypes in the order they come, in files of at most ``max_bytes``.

    ``close()`` gives the files their final names, writes the index if there are several, and returns which
    file holds which tensor. ``tensors`` is an upper bound on their number: each header is written last, into
    space reserved at the start of its file.
    """

    def __init__(self, directory: Path, tensors: int, max_bytes: int) -> None:
        self._directory, self._max_bytes = directory, max_bytes
        self._reserved = -(-_HEADER_BYTES_PER_TENSOR * (tensors + 1) // 8) * 8
        self._shards: list[dict[str, Any]] = []
        self._total = 0
        self._file: BinaryIO | None = None
        self._filled = self._offset = 0
        # Readers view the file as the tensor's dtype, so each must start at a multiple of its item size. A
        # tensor whose size is not a multiple of 8 would misalign the next one; these are written last.
        self._late: list[tuple[str, Tensor]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor."""
        size = tensor.numel() * tensor.itemsize
        if self._file is not None and self._filled + size > self._max_bytes:
            self._end_shard()
        if self._file is None:
            self._file = (self._directory / f"part-{len(self._shards)}").open("wb")
            self._file.write(b" " * (8 + self._reserved))
            self._shards.append({})
            self._offset = self._filled = 0
        self._filled += size
        if size % 8:
            self._late.append((name, tensor.detach().cpu().clone()))
        else:
            self._write(name, tensor)

    def close(self) -> dict[str, str]:
        self._end_shard()
        weight_map: dict[str, str] = {}
        count = len(self._shards)
        for number, header in enumerate(self._shards):
            file = SAFETENSORS if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self._directory / f"part-{number}").rename(self._directory / file)
            weight_map.update(dict.fromkeys((name for name in header if name != "__metadata__"), file))
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            text = json.dumps(index, indent=2) + "\n"
            (self._directory / f"{SAFETENSORS}.index.json").write_text(text, encoding="utf-8")
        return weight_map

    def _write(self, name: str, tensor: Tensor) -> None:
        assert self._file is not None
        plain = tensor.detach().cpu().contiguous()
        self._file.write(plain.view(torch.uint8).flatten().numpy().data)
        end = self._offset + plain.numel() * plain.itemsize
        offsets = [self._offset, end]
        entry = {"dtype": _STORED[plain.dtype], "shape": list(plain.shape), "data_offsets": offsets}
        self._shards[-1][name] = entry
        self._offset = end

    def _end_shard(self) -> None:
        if self._file is None:
            return
        for name, tensor in sorted(self._late, key=lambda item: -item[1].itemsize):
            self._write(name, tensor)
        self._late = []
        self._total += self._offset
        self._shards[-1]["__metadata__"] = {"format": "pt"}
        text = json.dumps(self._shards[-1], separators=(",", ":")).encode()
        assert len(text) <= self._reserved, "more tensors than were announced"
        self._file.seek(0)
        self._file.write(self._reserved.to_bytes(8, "little") + text)
        self._file.close()
        self._file = None
