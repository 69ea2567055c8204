"""Weight files tensor by tensor: in any order, without keeping them, and written as they come."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from xverse.config import UserError
from xverse.formats.weights import SafetensorsWriter, TensorFiles

TENSORS: dict[str, Tensor] = {
    "odd": torch.arange(7, dtype=torch.bfloat16),
    "words": torch.arange(-3, 5, dtype=torch.int32).view(2, 4),
    "shape": torch.tensor([3, 2**40]),
    "halves": torch.ones(3, 5, dtype=torch.float16),
    "floats": torch.randn(4, 3),
    "single": torch.tensor([1.5]),
}


@pytest.mark.parametrize("limit", [1, 50, 10**9])
def test_every_type_comes_back_at_an_even_place(tmp_path: Path, limit: int) -> None:
    writer = SafetensorsWriter(tmp_path, len(TENSORS), limit)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    weight_map = writer.close()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == {1: 6, 50: 4}.get(limit, 1)
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == TENSORS.keys() == weight_map.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert name in load_file(tmp_path / weight_map[name])
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == weight_map
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())


def test_reading_by_name(tmp_path: Path) -> None:
    save_file({"a.x": torch.ones(2), "b.x": torch.zeros(3)}, tmp_path / "one.safetensors")
    torch.save({"a.y": torch.ones(4), "c": torch.ones(1)}, tmp_path / "two.bin")
    files = TensorFiles([tmp_path / "one.safetensors", tmp_path / "two.bin"])
    assert set(files.names) == {"a.x", "b.x", "a.y", "c"}
    assert "a.y" in files
    assert "a.z" not in files
    assert {name: len(tensor) for name, tensor in files.read("a.").items()} == {"a.x": 2, "a.y": 4}
    assert torch.equal(files.get("b.x"), torch.zeros(3))


def test_a_name_in_two_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"two\.safetensors: holds 'a', and so does one\.safetensors"):
        TensorFiles([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])
