"""Baichuan's tensors under the model's names.

Its queries, keys and values are one matrix, ``W_pack``. Baichuan2 scales the rows of its head to length 1
(``modeling_baichuan.py`` of baichuan-inc/Baichuan2-7B-Base, ``NormHead``); scaled once, it is a plain head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from xverse.formats.weights import HEAD, TensorFiles
from xverse.model import XverseConfig

_PACKED = ".W_pack."


@dataclass(frozen=True)
class Packing:
    """``rows`` are those of queries, keys and values in ``W_pack``."""

    rows: tuple[int, int, int]
    normalized_head: bool

    def unpacked(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The model's names and tensors of one that is stored."""
        if _PACKED in name and len(tensor) == sum(self.rows):
            for part, rows in zip("qkv", tensor.split(self.rows), strict=True):
                yield name.replace(_PACKED, f".{part}_proj."), rows
        elif name == HEAD and self.normalized_head:
            yield name, normalize(tensor.float()).to(tensor.dtype)  # in float32, to round only once
        else:
            yield name, tensor


def packing_of(values: Mapping[str, Any], config: XverseConfig) -> Packing:
    """The packing of Baichuan's directory. The first model's class has a capital C."""
    first = "BaiChuanForCausalLM" in (values.get("architectures") or [])
    return Packing((config.attention_size, config.kv_size, config.kv_size), not first)


class UnpackedFiles(TensorFiles):
    """``TensorFiles`` under the model's names."""

    def __init__(self, files: Sequence[Path], packing: Packing) -> None:
        super().__init__(files)
        self._packing = packing

    @cached_property
    def _homes(self) -> dict[str, str]:
        """The stored name of each of the model's tensors."""
        homes: dict[str, str] = {}
        for name in self._home:
            parts = [f".{part}_proj." for part in "qkv"] if _PACKED in name else [_PACKED]
            homes |= {name.replace(_PACKED, part): name for part in parts}
        return homes

    @property
    def names(self) -> list[str]:
        return list(self._homes)

    def __contains__(self, name: str) -> bool:
        return name in self._homes

    def get(self, name: str) -> Tensor:
        home = self._homes[name]
        return dict(self._packing.unpacked(home, super().get(home)))[name]
