"""How a directory stores quantised weights: read into quantised layers or dequantised, and written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from xverse.config import UserError
from xverse.formats.compressed import (
    EMBEDDING,
    METHOD,
    TABLE_METHOD,
    StoredRows,
    Written,
    pack,
    quantization_config,
    read_scheme,
)
from xverse.formats.gptq import read_gptq_scheme
from xverse.formats.weights import SafetensorsWriter, TensorFiles, dtype_name
from xverse.kernels.linear import QuantEmbedding, QuantLinear
from xverse.kernels.tiles import from_rows, kernel_group_size, tile_rows
from xverse.kernels.weight import QuantizedWeight
from xverse.quant.settings import matrices
from xverse.texts import read_object

if TYPE_CHECKING:
    from xverse.model import XverseConfig

Placed = Callable[[nn.Module, str], None]  # takes a model and the name of a module that has its weight
GPTQ_CONFIG = "quantize_config.json"  # AutoGPTQ's, older than quantization_config


class Scheme(Protocol):
    """A storage format of matrices; their tensors' names end in ``suffixes``, one of each in ``marker``."""

    marker: str

    @property
    def suffixes(self) -> tuple[str, ...]: ...

    def read(self, files: TensorFiles, name: str, shape: tuple[int, int]) -> StoredRows: ...


def quantization_of(path: Path, values: Mapping[str, Any]) -> Scheme | None:
    """How the weights of a directory with ``config.json`` ``values`` are quantised, or None.

    Raises UserError that names a method that is not supported.
    """
    stated = values.get("quantization_config")
    where = path / "config.json"
    if stated is None and (path / GPTQ_CONFIG).is_file():
        where = path / GPTQ_CONFIG
        stated = {"quant_method": "gptq", **read_object(where)}
    if stated is None:
        return None
    return scheme_of(stated, where)


def scheme_of(stated: Any, where: str | Path) -> Scheme:
    """The scheme of a ``quantization_config``. Raises UserError as ``quantization_of``."""
    if not isinstance(stated, dict):
        raise UserError(f"{where}: quantization_config is not an object")
    method = stated.get("quant_method")
    if method in (METHOD, TABLE_METHOD):
        return read_scheme(stated, where)
    if method == "gptq":
        return read_gptq_scheme(stated, where)
    named = f"quant_method '{method}'" if method else "quantization_config without quant_method"
    raise UserError(f"{where}: {named} is not supported; use the unquantised model")


def quantized_names(files: TensorFiles, scheme: Scheme) -> list[str]:
    """The names of the modules whose weights are quantised, in the files' order."""
    suffix = f".{scheme.marker}"
    return [name.removesuffix(suffix) for name in files.names if name.endswith(suffix)]


def load_layers(
    model: nn.Module,
    files: TensorFiles,
    scheme: Scheme,
    dtype: torch.dtype,
    where: Path,
    device: torch.device | str = "cpu",
    placed: Placed | None = None,
) -> None:
    """Replace the layers of ``model`` whose weights are stored quantised by quantised layers.

    Matrices are read, tiled, moved to ``device`` and released one at a time, so that at most one is in memory
    twice. On the CPU the embedding's rows stay in the mapped file, of which only rows that are looked up
    become resident. ``dtype`` is the dtype of the embedding's output; ``placed`` is called for each layer.
    Raises UserError for a damaged tensor and for one that belongs to no layer.
    """
    for name in quantized_names(files, scheme):
        layer = layer_of(model, name, where)
        shape = (layer.weight.shape[0], layer.weight.shape[1])
        stored = read_stored(files, scheme, name, shape, where)
        module = quantized_layer(stored, layer, dtype).to(device)
        if getattr(layer, "bias", None) is not None:
            module.bias = layer.bias  # still without data; it is read with the other tensors
        set_layer(model, name, module)
        if placed is not None:
            placed(model, name)


def quantized_layer(stored: StoredRows, layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The quantised counterpart of ``layer`` with the weight ``stored``."""
    if isinstance(layer, nn.Embedding):
        return QuantEmbedding(stored.rows, stored.scales, stored.bits, dtype)
    inputs = stored.rows.shape[1] * 8 // stored.bits
    group = inputs // stored.scales.shape[1]
    repeat = group // kernel_group_size(group)
    scales = stored.scales.repeat_interleave(repeat, dim=1) if repeat > 1 else stored.scales
    module = QuantLinear(inputs, stored.scales.shape[0], stored.bits, group, stored.table is not None)
    module.tiles = tile_rows(stored.rows, scales, stored.bits, stored.table)
    module.order, module.centres, module.nearest = stored.order, stored.centres, stored.nearest
    return module


def dequantized(
    files: TensorFiles, scheme: Scheme, name: str, shape: tuple[int, int], dtype: torch.dtype, where: Path
) -> Tensor:
    """The dequantised weight [N, K] of a module, in ``dtype``."""
    stored = read_stored(files, scheme, name, shape, where)
    integers = from_rows(stored.rows, stored.scales, stored.bits, stored.table)
    weight = replace(integers, centres=stored.centres, nearest=stored.nearest).dequantize().to(dtype)
    return weight if stored.order is None else torch.empty_like(weight).index_copy_(1, stored.order, weight)


def layer_of(model: nn.Module, name: str, where: Path) -> Any:
    """The linear or embedding ``name`` of a model. Raises UserError if it has none of that name."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if not isinstance(layer, (nn.Linear, nn.Embedding)):
        raise UserError(f"{where}: the weights do not fit config.json: unexpected {name}")
    return layer


def set_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace the module ``name`` of ``model``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def read_stored(
    files: TensorFiles, scheme: Scheme, name: str, shape: tuple[int, int], where: Path
) -> StoredRows:
    """``scheme.read``; its errors name ``where``, also that for a further tensor that is not 0."""
    known = {f"{name}.{suffix}" for suffix in (*scheme.suffixes, "bias")}
    try:
        for other in files.names:
            if other.startswith(f"{name}.") and other not in known and files.get(other).any():
                raise UserError(f"{other} is unexpected")
        return scheme.read(files, name, shape)
    except UserError as error:
        if str(where) in str(error):  # the message names the file already
            raise
        raise UserError(f"{where}: {error}") from None


def write_quantized(
    tensors: Iterable[tuple[str, Tensor | QuantizedWeight]],
    config: XverseConfig,
    directory: Path,
    max_shard_bytes: int,
    activations: bool = False,
) -> dict[str, Any]:
    """Write the weights of a model into ``directory`` in the order they come; ``activations``: for products
    with INT8 activations.

    Returns the keys ``quantization_config`` and ``torch_dtype`` for config.json. Tensors that are not
    quantised keep their dtype.
    """
    tensors_at_most = 4 * len([*matrices(config)]) + 7 * config.num_hidden_layers + 14
    writer = SafetensorsWriter(directory, tensors_at_most, max_shard_bytes)
    kinds: dict[str, Written] = {}
    plain: list[str] = []
    dtype = torch.bfloat16
    for name, tensor in tensors:
        module = name.removesuffix(".weight")
        if isinstance(tensor, QuantizedWeight):
            groups = tensor.scales.shape[1]
            kinds[module] = Written(tensor.bits, tensor.q.shape[1], groups, tensor.table is not None)
            for suffix, part in pack(tensor, activations).items():
                writer.add(f"{module}.{suffix}", part)
        else:
            if tensor.dim() == 2 and module != EMBEDDING:
                plain.append(module)
            dtype = tensor.dtype
            writer.add(name, tensor)
    writer.close()
    return {
        "torch_dtype": dtype_name(dtype),
        "quantization_config": quantization_config(kinds, plain, activations),
    }
