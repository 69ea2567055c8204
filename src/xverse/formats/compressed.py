"""compressed-tensors' ``pack-quantized`` format: its ``quantization_config`` and its tensors.

For each quantised matrix [N, K] of ``b`` bits a file holds ``weight_packed`` int32 [N, K·b/32] (values offset
by 2^(b-1), the lowest input in the lowest bits), ``weight_scale`` [N, K/group] and ``weight_shape`` int64 [2]
(https://github.com/vllm-project/compressed-tensors). As little-endian bytes the packed rows are those of
``kernels.tiles.to_rows``, so reading and writing only move bytes.

That format has integers only. Weights that are indices into a table are stored in the same way, with
``weight_table`` int8 [2^b] beside them, under this project's own ``quant_method`` and the type ``table``;
``weight_centres`` bfloat16 [C, K], if there are any, are added to the rows: to each the one of its index in
``weight_nearest`` uint8 [N].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xverse.config import UserError
from xverse.formats.weights import TensorFiles, dtype_name, listed
from xverse.kernels.tiles import kernel_group_size, to_rows
from xverse.kernels.weight import GROUP_SIZES, INTEGER_BITS, TABLES, QuantizedWeight

METHOD, TABLE_METHOD = "compressed-tensors", "xverse"
FORMAT, TABLE_FORMAT = "pack-quantized", "table-quantized"
PLAIN_FORMAT = "int-quantized"  # INT8 that is not packed, for products with INT8 activations
ACTIVATIONS = {  # quantised for each token while the model runs
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "dynamic": True,
}
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape")
_TABLE, _CENTRES, _NEAREST = "weight_table", "weight_centres", "weight_nearest"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
_UNSUPPORTED = ("weight_zero_point", "weight_g_idx")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class StoredRows:
    """A quantised matrix for the loader: ``rows`` uint8 [N, K · bits / 8] as ``kernels.tiles.to_rows`` writes
    them, ``scales`` bfloat16 [N, K/group], ``table``, ``centres`` and ``nearest`` as in
    ``QuantizedWeight``. With ``order`` int64 [K] the inputs are permuted: column k belongs to input
    ``order[k]``.
    """

    rows: Tensor
    scales: Tensor
    bits: int
    order: Tensor | None = None
    table: Tensor | None = None
    centres: Tensor | None = None
    nearest: Tensor | None = None


class Kind(NamedTuple):
    """How matrices are stored: ``group_size`` None is one scale per row."""

    bits: int
    group_size: int | None
    table: bool = False


@dataclass(frozen=True)
class CompressedScheme:
    """The kinds of matrices in a ``quantization_config``."""

    kinds: frozenset[Kind]
    marker = "weight_packed"
    suffixes = (*SUFFIXES, _TABLE, _CENTRES, _NEAREST, *_UNSUPPORTED)

    def read(self, files: TensorFiles, name: str, shape: tuple[int, int]) -> StoredRows:
        """The matrix ``name`` (without ``.weight``) of ``shape`` [N, K].

        Raises UserError for a tensor that is missing or has the wrong shape or dtype, and for scales that are
        not finite.
        """
        outputs, inputs = shape
        for suffix in SUFFIXES:
            if f"{name}.{suffix}" not in files:
                raise UserError(f"{name}.{suffix} is missing")
        for extra in _UNSUPPORTED:
            if f"{name}.{extra}" in files:
                raise UserError(f"{name}.{extra}: zero points and activation order are not supported")
        stated = files.get(f"{name}.weight_shape")
        if stated.dtype.is_floating_point or stated.tolist() != [outputs, inputs]:
            raise UserError(
                f"{name}.weight_shape is {stated.tolist()}, but config.json implies [{outputs}, {inputs}]"
            )
        scale, packed = files.get(f"{name}.weight_scale"), files.get(f"{name}.weight_packed")
        widths = {inputs * kind.bits // 32: kind.bits for kind in self.kinds}
        if packed.dtype != torch.int32 or packed.dim() != 2 or packed.shape[0] != outputs:
            raise UserError(f"{name}.weight_packed is {_describe(packed)}, not int32 with {outputs} rows")
        if packed.shape[1] not in widths:
            offered = " or ".join(f"{width} for {bits} bits" for width, bits in sorted(widths.items()))
            raise UserError(f"{name}.weight_packed has {packed.shape[1]} columns, not {offered}")
        bits = widths[packed.shape[1]]
        table = self._table(files, name, bits)
        alike = [kind for kind in self.kinds if (kind.bits, kind.table) == (bits, table is not None)]
        groups = {inputs // kind.group_size if kind.group_size else 1 for kind in alike}
        if scale.dtype not in _FLOATS or scale.dim() != 2 or scale.shape[0] != outputs:
            raise UserError(f"{name}.weight_scale is {_describe(scale)}, not floats with {outputs} rows")
        if scale.shape[1] not in groups:
            offered = " or ".join(map(str, sorted(groups)))
            raise UserError(f"{name}.weight_scale has {scale.shape[1]} groups, not {offered}")
        check_kernel_group(name, inputs // scale.shape[1])
        scales = checked_scales(f"{name}.weight_scale", scale)
        centres = self._centres(files, name, shape) if table is not None else (None, None)
        return StoredRows(packed.view(torch.uint8), scales, bits, None, table, *centres)

    def _centres(self, files: TensorFiles, name: str, shape: tuple[int, int]) -> tuple[Tensor | None, ...]:
        outputs, inputs = shape
        names = f"{name}.{_CENTRES}", f"{name}.{_NEAREST}"
        missing = [part for part in names if part not in files]
        if len(missing) == 2:
            return None, None
        if missing:
            raise UserError(f"{missing[0]} is missing")
        centres, nearest = (files.get(part) for part in names)
        if centres.dtype not in _FLOATS or centres.dim() != 2 or centres.shape[1] != inputs:
            raise UserError(f"{names[0]} is {_describe(centres)}, not floats with {inputs} columns")
        if nearest.dtype != torch.uint8 or nearest.shape != (outputs,):
            raise UserError(f"{names[1]} is {_describe(nearest)}, not uint8 [{outputs}]")
        if int(nearest.max()) >= len(centres):
            raise UserError(f"{names[1]} holds {int(nearest.max())}, but there are {len(centres)} centres")
        return checked_scales(names[0], centres).clone(), nearest.clone()  # not the mapped file

    def _table(self, files: TensorFiles, name: str, bits: int) -> Tensor | None:
        """The matrix's table. Raises UserError unless it is as the kinds of its ``bits`` declare."""
        stored = f"{name}.{_TABLE}"
        declared = {kind.table for kind in self.kinds if kind.bits == bits}
        if (stored in files) not in declared:
            what = "is missing" if True in declared else "is not announced in config.json"
            raise UserError(f"{stored} {what}")
        if stored not in files:
            return None
        table = files.get(stored)
        if table.dtype != torch.int8 or table.shape != (1 << bits,):
            raise UserError(f"{stored} is {_describe(table)}, not int8 [{1 << bits}]")
        if not (table.int().diff() > 0).all():
            raise UserError(f"{stored} is not in ascending order")
        return table


@dataclass(frozen=True)
class PlainScheme:
    """``int-quantized`` weights of 8 bits with a scale per row: ``weight`` int8 [N, K], ``weight_scale``."""

    marker = "weight_scale"
    suffixes = ("weight", "weight_scale")

    def read(self, files: TensorFiles, name: str, shape: tuple[int, int]) -> StoredRows:
        """As ``CompressedScheme.read``."""
        if f"{name}.weight" not in files:
            raise UserError(f"{name}.weight is missing")
        weight, scale = files.get(f"{name}.weight"), files.get(f"{name}.weight_scale")
        if weight.dtype != torch.int8 or tuple(weight.shape) != shape:
            raise UserError(f"{name}.weight is {_describe(weight)}, not int8 [{shape[0]}, {shape[1]}]")
        if scale.dtype not in _FLOATS or scale.numel() != shape[0]:
            raise UserError(f"{name}.weight_scale is {_describe(scale)}, not floats with {shape[0]} rows")
        check_kernel_group(name, shape[1])
        scales = checked_scales(f"{name}.weight_scale", scale.view(-1, 1))
        return StoredRows(weight.view(torch.uint8) ^ 0x80, scales, 8)


def check_kernel_group(name: str, group_size: int) -> None:
    """Raise UserError for a group size that is not a multiple of a kernel's."""
    if not kernel_group_size(group_size):
        raise UserError(f"{name}: groups of {group_size} inputs are not supported, only multiples of 32")


def checked_scales(name: str, scales: Tensor) -> Tensor:
    """Scales as bfloat16, the kernels' dtype. Raises UserError if one is NaN or infinite.

    Scales stored in float16 or float32 are rounded. This changes the weights of a group by at most 2^-8 of
    their value, 0.16 % in the mean square, little compared with quantisation (10 % with 4 bits, 0.7 % with
    8).
    """
    if not scales.isfinite().all():
        raise UserError(f"{name} holds NaN or infinity")
    return scales.to(torch.bfloat16).contiguous()


def pack(weight: QuantizedWeight, plain: bool = False) -> dict[str, Tensor]:
    """The tensors of a matrix, by suffix; ``plain``: as ``PlainScheme`` reads them."""
    if plain:
        return {"weight": weight.q.contiguous(), "weight_scale": weight.scales.contiguous()}
    others = {_TABLE: weight.table, _CENTRES: weight.centres, _NEAREST: weight.nearest}
    return {suffix: part for suffix, part in others.items() if part is not None} | {
        "weight_packed": to_rows(weight).contiguous().view(torch.int32),
        "weight_scale": weight.scales.contiguous(),
        "weight_shape": torch.tensor(weight.q.shape),
    }


def read_scheme(values: Mapping[str, Any], where: str | Path) -> CompressedScheme | PlainScheme:
    """The scheme of a ``quantization_config``, whichever program wrote it.

    Raises UserError that names what the kernels do not support: other formats, asymmetric or floating-point
    weights, quantised activations or cache, activation order, sparsity, transforms.
    """

    def refuse(what: str) -> UserError:
        return UserError(f"{where}: quantization_config: {what} is not supported; use the unquantised model")

    own = values.get("quant_method") == TABLE_METHOD
    form = values.get("format", TABLE_FORMAT if own else FORMAT)
    if form not in ((TABLE_FORMAT,) if own else (FORMAT, PLAIN_FORMAT)):
        raise refuse(f"the format '{values['format']}'")
    for key, what in (("kv_cache_scheme", "a quantised cache"), ("transform_config", "a transform")):
        if values.get(key):
            raise refuse(f"{what} ({key})")
    sparsity = values.get("sparsity_config") or {}
    if sparsity and sparsity.get("format", "dense") != "dense":
        raise refuse(f"the sparsity '{sparsity['format']}'")
    groups = values.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(g, dict) for g in groups.values()):
        raise UserError(f"{where}: quantization_config: config_groups does not say how weights are stored")
    kinds = set()
    for name, group in groups.items():
        if group.get("format") not in (None, form):
            raise refuse(f"the format '{group['format']}' of {name}")
        for key in ("input_activations", "output_activations"):
            stated = group.get(key)
            if key == "input_activations" and form == PLAIN_FORMAT and _dynamic_int8(stated or {}):
                continue  # the kernels quantise activations themselves
            if stated:
                raise refuse(f"quantised activations ({key} of {name})")
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise refuse(f"{name} without weights")
        kinds.add(_kind(weights, refuse, name, own))
    if form != PLAIN_FORMAT:
        return CompressedScheme(frozenset(kinds))
    if kinds != {Kind(8, None)}:
        raise refuse(f"the format '{form}' with other weights than INT8 with a scale per row")
    return PlainScheme()


def _dynamic_int8(activations: Mapping[str, Any]) -> bool:
    return all(activations.get(key) == value for key, value in ACTIVATIONS.items())


def _kind(weights: Mapping[str, Any], refuse: Any, name: str, own: bool) -> Kind:
    table = own and weights.get("type") == "table"
    if not table and weights.get("type", "int") != "int":
        raise refuse(f"the weight type '{weights['type']}' of {name}")
    if weights.get("symmetric", True) is not True:
        raise refuse(f"asymmetric quantisation ({name})")
    if weights.get("dynamic", False):
        raise refuse(f"dynamic quantisation ({name})")
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise refuse(f"activation order ({name}: actorder '{weights['actorder']}')")
    bits = weights.get("num_bits", 8)
    if bits not in (tuple(TABLES) if table else INTEGER_BITS):
        raise refuse(f"{bits} bits ({name})")
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("group" if size and size > 0 else "channel" if size else "tensor")
    if strategy == "channel":
        return Kind(bits, None, table)
    if strategy != "group":
        raise refuse(f"the strategy '{strategy}' of {name}")
    if not isinstance(size, int) or not kernel_group_size(size):
        raise refuse(f"a group_size of {size} ({name})")
    return Kind(bits, size, table)


class Written(NamedTuple):
    """What ``quantization_config`` has to know of a quantised matrix."""

    bits: int
    inputs: int
    groups: int
    table: bool


def quantization_config(
    weights: Mapping[str, Written], plain: Iterable[str], activations: bool = False
) -> dict[str, Any]:
    """The ``quantization_config`` of written weights by module names; ``plain`` are the names of unquantised
    linears, ``activations``: for products with INT8 activations. The most common kind applies to all
    ``Linear``; others are listed by name.
    """
    linears = {name: value for name, value in weights.items() if name != EMBEDDING}
    kinds = {name: Kind(each.bits, _size(name, weights), each.table) for name, each in weights.items()}
    groups: dict[Kind, list[str]] = {}
    if linears:
        inner = Counter(kinds[name] for name in linears if name != HEAD or len(linears) == 1)
        groups[inner.most_common(1)[0][0]] = ["Linear"]
    for name, kind in kinds.items():
        targets = groups.setdefault(kind, [])
        if name == EMBEDDING:
            targets.append("Embedding")
        elif "Linear" not in targets:
            targets.append(name)
    # Names come first: the library warns about a name that an earlier class covers.
    listed_groups = sorted(groups.items(), key=lambda item: "Linear" in item[1])
    method = TABLE_METHOD if any(kind.table for kind in groups) else METHOD
    return {
        "quant_method": method,
        "format": PLAIN_FORMAT if activations else TABLE_FORMAT if method == TABLE_METHOD else FORMAT,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(plain),
        "config_groups": {
            f"group_{number}": {
                "targets": targets,
                "weights": {
                    "num_bits": kind.bits,
                    "type": "table" if kind.table else "int",
                    "symmetric": True,
                    "strategy": "group" if kind.group_size else "channel",
                    "group_size": kind.group_size,
                    "dynamic": False,
                },
                "input_activations": dict(ACTIVATIONS) if activations else None,
                "output_activations": None,
            }
            for number, (kind, targets) in enumerate(listed_groups)
        },
    }


def _size(name: str, weights: Mapping[str, Written]) -> int | None:
    """Group size of a matrix, None for one scale per row. For a single group the other matrices decide."""
    inputs, count = weights[name].inputs, weights[name].groups
    if count > 1:
        return inputs // count
    grouped = any(each.groups > 1 for each in weights.values())
    return inputs if grouped and inputs in GROUP_SIZES else None


def _describe(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} [{', '.join(map(str, tensor.shape))}]"


def refuse_order(names: Iterable[str]) -> None:
    """Raise UserError if matrices with permuted inputs would have to be written."""
    if names := list(names):
        raise UserError(
            f"{listed(names)}: a model with activation order cannot be written in this format; "
            "xverse export writes it dequantised"
        )
