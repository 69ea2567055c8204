"""Weight files: which file holds which tensor, memory-mapped reading, and streaming safetensors writing.

The safetensors layout is 8 bytes of header length, a JSON header, then the tensors' bytes one after another
(https://github.com/huggingface/safetensors#format). It is written here by hand because the library takes
whole shards: tensor by tensor, a conversion never holds more than one converted tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xverse.config import UserError

SAFETENSORS = "model.safetensors"
PYTORCH = "pytorch_model.bin"
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # torch's name → safetensors' name
GIT_LFS = b"version https://git-lfs"


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` → ``bfloat16``, as ``config.json`` writes it."""
    return str(dtype).removeprefix("torch.")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError for a missing or ill-formed file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object")
    return values


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a model directory, safetensors before ``.bin``, in the index's order.

    Raises UserError for a directory without weights and for an index that names a missing file.
    """
    for name in (SAFETENSORS, PYTORCH):
        index = directory / f"{name}.index.json"
        if index.exists():
            return _indexed(index)
        if (directory / name).exists():
            return [directory / name]
    shards = sorted(path.name for path in directory.glob("*-of-*") if path.suffix in (".safetensors", ".bin"))
    if shards:
        raise UserError(f"{directory}: has {len(shards)} weight shards ({shards[0]} …) but no *.index.json")
    raise UserError(f"{directory}: has no weights ({SAFETENSORS} or {PYTORCH}, single or sharded)")


def _indexed(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
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


def listed(names: Iterable[str], limit: int = 4) -> str:
    """``a, b, c, d and 7 more``."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_tensors(path: Path, *, hold: bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one weight file in turn, on the CPU in their stored dtype, without copying.

    Their storage is the memory-mapped file. With ``hold`` all share one mapping, for a model that keeps
    them; without it each safetensors tensor has a mapping of its own, which goes when the tensor goes, so
    that converting a large file does not keep all of it resident.
    Raises UserError for a truncated or foreign file and for a pickle that holds more than tensors.
    """
    if path.suffix == ".safetensors":
        yield from _read_safetensors(path, hold)
    else:
        yield from _read_pickle(path)


def _read_safetensors(path: Path, hold: bool) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if hold:
                for name in names:
                    yield name, file.get_tensor(name)
                return
        for name in names:
            with safe_open(path, framework="pt") as file:
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        _unreadable(path, error)


def _read_pickle(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "_use_new_zipfile_serialization" not in str(error):
                raise
            tensors = torch.load(path, map_location="cpu", weights_only=True)  # before torch 1.6: no mapping
    except MemoryError:
        raise
    except Exception as error:  # the unpickler raises whatever the bytes of a foreign file lead it to
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise UserError(
                f"{path}: holds something other than tensors, and running code from a weight file is refused"
            ) from None
        _unreadable(path, error)
    if not isinstance(tensors, dict):
        raise UserError(f"{path}: expected a mapping of names to tensors, found {type(tensors).__name__}")
    for name in list(tensors):
        tensor = tensors.pop(name)
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path}: '{name}' is not a tensor but {type(tensor).__name__}")
        yield name, tensor


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


def write_safetensors(
    path: Path, shapes: Mapping[str, Iterable[int]], dtype: torch.dtype, tensors: Iterable[Tensor]
) -> None:
    """Write one safetensors file. ``tensors`` come in the order of ``shapes`` and are cast to ``dtype``."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = dtype.itemsize
        for length in shape:
            size *= length
        offsets = [end, end + size]
        header[name] = {"dtype": DTYPES[dtype_name(dtype)], "shape": list(shape), "data_offsets": offsets}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8, as the format asks
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            plain = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
            file.write(plain.view(torch.uint8).flatten().numpy().data)
        assert file.tell() == 8 + len(text) + end, "tensors do not match the announced shapes"
