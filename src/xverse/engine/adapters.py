"""LoRA adapters (Hu et al., 2021, arXiv:2106.09685) over one model, applied unmerged: the tokens of a step
may have different ones."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xverse.config import UserError
from xverse.formats import ModelDirectory, load_model
from xverse.formats.adapters import check_adapter, check_base, fingerprint
from xverse.formats.lora import read_lora
from xverse.kernels.fused_step import LINEARS, Adapted
from xverse.kernels.lora import Factors, add_lora_, struct
from xverse.kernels.native import Lora
from xverse.model.transformer import XverseForCausalLM

MOST_RANK = 64  # unless a server sets another limit
MOST_ADAPTERS = 32  # with names
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}")


def check_name(name: str) -> None:
    """Raises UserError for a name that requests could not send."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name[:80]!r} is not a name for an adapter; use up to 128 letters, digits and . _ : / @ -"
        )


def given_adapters(given: str | Sequence[str] | None) -> tuple[str | None, dict[str, str]]:
    """The values of ``--adapter``: the directory of one adapter that is a part of the model, or the
    directories of several by their names, from ``NAME=DIR``. Raises UserError."""
    values = [given] if isinstance(given, str) else [*(given or ())]
    named: dict[str, str] = {}
    alone: list[str] = []
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or Path(value).expanduser().is_dir():
            alone.append(value)
            continue
        check_name(name)
        if name in named:
            raise UserError(f"--adapter: the name '{name}' is given twice")
        named[name] = path
    if len(alone) > 1 or (alone and named):
        raise UserError(
            f"--adapter: {alone[0]} has no name and would become a part of the model; give each of several "
            "adapters a name (NAME=DIR)"
        )
    if len(named) > MOST_ADAPTERS:
        raise UserError(f"--adapter: {len(named)} adapters are too many; the limit is {MOST_ADAPTERS}")
    return (alone[0] if alone else None), named


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter of the engine's model; ``factors`` by the names of its linear layers. ``digest`` is equal
    for adapters that compute the same: cached prefixes belong to it."""

    digest: bytes
    factors: dict[str, Factors]
    rank: int
    table: ctypes.Array[Lora]  # of the layers in LINEARS

    @classmethod
    def of(cls, digest: bytes, factors: dict[str, Factors], layers: int) -> Adapter:
        names = [f"model.layers.{layer}.{path}" for layer in range(layers) for path in LINEARS.values()]
        table = (Lora * len(names))(*(struct(factors.get(name)) for name in names))
        return cls(digest, factors, max(len(a) for a, _ in factors.values()), table)


class AdapterLoader:
    """Reads adapters of a model: of ``model``, which was loaded from ``directory``."""

    def __init__(self, directory: ModelDirectory, model: XverseForCausalLM, most_rank: int) -> None:
        self._directory, self._model, self._most_rank = directory, model, most_rank

    @functools.cached_property
    def _fingerprint(self) -> str:
        return fingerprint(load_model(self._directory))  # mapped: few values are read

    def __call__(self, path: str | Path, most_rank: int | None = None) -> Adapter:
        """The adapter of a directory in peft's format, in the model's dtype and on its device. Raises
        UserError for one of another base, one that does not fit the model, and one of a kind or rank that
        is not supported."""
        check_base(lambda: self._fingerprint, check_adapter(path), self._directory.path.name)
        weight = self._model.model.norm.weight
        most = self._most_rank if most_rank is None else most_rank
        digest, factors = read_lora(Path(path).expanduser(), self._model, most)
        cast = {
            name: (
                a.to(weight.device, weight.dtype).contiguous(),
                b.to(weight.device, weight.dtype).contiguous(),
            )
            for name, (a, b) in factors.items()
        }
        return Adapter.of(digest, cast, self._model.config.num_hidden_layers)


class StepAdapters:
    """The adapters of the tokens that the model computes next. Layers that an adapter changes get a hook."""

    def __init__(self, model: XverseForCausalLM) -> None:
        self._model = model
        self._hooks: dict[str, torch.utils.hooks.RemovableHandle] = {}
        self._now: list[tuple[Adapter, tuple[int, int] | None]] = []

    def attach(self, adapter: Adapter) -> None:
        """Prepare the layers that the adapter changes."""
        for name in adapter.factors.keys() - self._hooks.keys():
            hook = functools.partial(self._add, name)
            self._hooks[name] = self._model.get_submodule(name).register_forward_hook(hook)

    def set(self, tokens: Sequence[tuple[Adapter | None, int]]) -> None:
        """The next pass has tokens of these adapters, as many as given, in order; tokens without an adapter
        come first, those of one adapter are together."""
        segments: dict[Adapter, tuple[int, int]] = {}
        at = 0
        for adapter, count in tokens:
            if adapter is not None:
                begin, end = segments.get(adapter, (at, at))
                assert end == at, "tokens of one adapter are adjacent"
                segments[adapter] = begin, at + count
            at += count
        self._now = [*segments.items()]

    def set_all(self, adapter: Adapter | None) -> None:
        """All tokens of the next passes have this adapter."""
        self._now = [] if adapter is None else [(adapter, None)]

    def fused(self) -> list[Adapted]:
        """For the fused step."""
        return [(adapter.table, segment) for adapter, segment in self._now if segment is not None]

    @property
    def any(self) -> bool:
        return bool(self._now)

    def _add(self, name: str, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not self._now:
            return None
        x, y = args[0].flatten(0, -2), output.flatten(0, -2)  # [N, K], [N, out]: views
        factors = [adapter.factors.get(name) for adapter, _ in self._now]
        segments = [segment or (0, len(x)) for _, segment in self._now]
        add_lora_(x, y, factors, segments)
        return y.view(output.shape)


def order_of(adapters: Sequence[Adapter | None]) -> Callable[[Adapter | None], int]:
    """A key that sorts tokens without an adapter first and those of one adapter together."""
    numbers: dict[Adapter, int] = {}
    for adapter in adapters:
        if adapter is not None:
            numbers.setdefault(adapter, len(numbers) + 1)
    return lambda adapter: 0 if adapter is None else numbers[adapter]
