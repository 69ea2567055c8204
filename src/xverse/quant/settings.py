"""How to quantise a model: bits, groups and method of each matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from xverse.config import UserError
from xverse.kernels.weight import GROUP_SIZES, INTEGER_BITS, check_bits, check_group_size, table_of
from xverse.model import XverseConfig

Method = Literal["rtn", "rtn-row", "gptq"]
METHODS: tuple[Method, ...] = ("rtn", "rtn-row", "gptq")
Format = tuple[int, int]  # bits, inputs that share a scale
_DEFAULTS: Mapping[int, tuple[Method, int, int]] = {
    2: ("gptq", 64, 4),
    3: ("gptq", 64, 4),
    4: ("gptq", 64, 4),
    8: ("rtn", 128, 8),
}


@dataclass(frozen=True, kw_only=True)
class QuantSettings:
    """How to quantise. ``head_bits`` and ``embedding_bits`` are 4, 8, or 16 for not quantised; None means 16
    with upstream's ``rtn-row`` and 8 with the other methods.

    ``group_size`` is the largest number of inputs that share a scale; a matrix whose inputs it does not
    divide gets the largest group size that does. ``formats`` has bits and group size of single matrices, by
    name (``model.layers.0.mlp.up_proj``), which go before ``bits`` and ``group_size``. ``balance``: scale
    columns against their inputs (``equalize.py``); an adapter of the unquantised model needs the inputs as
    they were. ``table``: round weights of the linears to the entries of a table instead of integers where
    their bits have one, which other programs' formats and the kernels of GPUs do not know.
    ``refine``: fit scales and norms from end to end at last, if the model has at most a billion parameters.
    Raises UserError for unsupported bits, methods or group sizes.
    """

    bits: int
    method: Method = "rtn"
    group_size: int = 128
    head_bits: int | None = None
    embedding_bits: int | None = None
    formats: Mapping[str, Format] = field(default_factory=dict)
    balance: bool = True
    table: bool = False
    refine: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.method not in METHODS:
            raise UserError(f"method: '{self.method}' is not one of {', '.join(METHODS)}")
        check_group_size(self.group_size)
        for name in ("head_bits", "embedding_bits"):
            if getattr(self, name) not in (None, 4, 8, 16):
                raise UserError(f"{name}: {getattr(self, name)} is not supported; 4, 8 or 16")
        for bits, group_size in self.formats.values():
            check_bits(bits)
            check_group_size(group_size)

    @property
    def resolved_head_bits(self) -> int:
        return self.head_bits or (16 if self.method == "rtn-row" else 8)

    @property
    def resolved_embedding_bits(self) -> int:
        return self.embedding_bits or (16 if self.method == "rtn-row" else 8)

    def format_of(self, name: str, inputs: int, bits: int | None = None) -> Format:
        """Bits and group size of the matrix ``name``; ``bits`` if they are not those of the layers."""
        if name in self.formats:
            return self.formats[name]
        return bits or self.bits, fitting_group(inputs, self.group_size)

    def table_of(self, bits: int) -> Tensor | None:
        """The table of linears of ``bits``, int8 [2^bits], or None."""
        return table_of(bits) if self.table or bits not in INTEGER_BITS else None


def default_settings(
    bits: int,
    method: Method | None = None,
    group_size: int | None = None,
    head_bits: int | None = None,
    formats: Mapping[str, Format] | None = None,
    table: bool = True,
) -> QuantSettings:
    """The settings of ``xverse quantize``: what is None has the default of ``bits``; ``table`` if the method
    can have one."""
    check_bits(bits)
    default_method, default_group, default_head = _DEFAULTS[bits]
    method = method or default_method
    if head_bits is None and method == "gptq":
        head_bits = default_head
    if group_size is None:
        group_size = default_group if method == default_method else QuantSettings.group_size
    # transformers cannot load a quantised embedding, and XVERSE's stays in the mapped file anyway.
    return QuantSettings(
        bits=bits,
        method=method,
        group_size=group_size,
        head_bits=head_bits,
        embedding_bits=16,
        formats=formats or {},
        table=table and method != "rtn-row",
    )


def fitting_group(inputs: int, largest: int) -> int:
    """The largest group size up to ``largest`` that divides ``inputs``. Raises UserError if none does."""
    fitting = [size for size in GROUP_SIZES if size <= largest and inputs % size == 0]
    if not fitting:
        raise UserError(
            f"group_size: none of {', '.join(map(str, GROUP_SIZES))} up to {largest} divides the {inputs} "
            "inputs of a layer, so that the model cannot be quantised with it"
        )
    return max(fitting)


def describe_groups(settings: QuantSettings, config: XverseConfig) -> str | None:
    """A sentence about layers whose groups are smaller than ``settings`` has them, or None."""
    if settings.method == "rtn-row":
        return None
    smaller = {size: fitting_group(size, settings.group_size) for size in input_sizes(config)}
    changed = [
        f"{group} for {size} inputs" for size, group in smaller.items() if group != settings.group_size
    ]
    if not changed:
        return None
    return f"groups of {' and '.join(changed)}, which {settings.group_size} does not divide"


def input_sizes(config: XverseConfig) -> tuple[int, ...]:
    """The numbers of inputs of a model's linears, which the size of a group has to divide."""
    sizes = [config.hidden_size, config.attention_size, config.intermediate_size]
    if config.num_experts and config.num_shared_experts:
        sizes.append(config.num_shared_experts * config.intermediate_size)
    return tuple(dict.fromkeys(sizes))


def matrices(config: XverseConfig) -> Iterator[tuple[str, int, int]]:
    """Name, outputs and inputs of every linear but the head and the routers, in the model's order."""
    hidden, attention = config.hidden_size, config.attention_size
    shapes = {
        "self_attn.q_proj": (attention, hidden),
        "self_attn.k_proj": (config.kv_size, hidden),
        "self_attn.v_proj": (config.kv_size, hidden),
        "self_attn.o_proj": (hidden, attention),
    }
    for name, width in config.networks.items():
        shapes |= {f"{name}.gate_proj": (width, hidden), f"{name}.up_proj": (width, hidden)}
        shapes[f"{name}.down_proj"] = (hidden, width)
    for number in range(config.num_hidden_layers):
        for name, shape in shapes.items():
            yield f"model.layers.{number}.{name}", *shape
