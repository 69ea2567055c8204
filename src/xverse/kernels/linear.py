"""Layers with quantised weights that replace ``nn.Linear`` and ``nn.Embedding``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import xverse.kernels.cuda  # noqa: F401  (registers the operations on CUDA)
from xverse.kernels import ops
from xverse.kernels.tiles import from_rows, kernel_group_size, tile, tile_shape, to_rows, untile
from xverse.kernels.weight import QuantizedWeight, add_centres

_PRODUCTS = 1 << 22  # of inputs and centres held at a time


class QuantLinear(nn.Module):
    """``x`` [..., in_features] → [..., out_features] with a weight of 2 to 4 or 8 bits, and a ``bias`` or
    None. ``tiles`` are to be assigned.

    ``tiles`` is the weight in the kernels' layout (``tiles.py``), on the CPU and on GPUs; ``table``: with a
    table, as all weights of 2 and 3 bits, whose kernel group is ``table_group`` (otherwise 0). With ``order``
    int64 [in_features] the weight's columns are permuted, as by GPTQ's activation order: column k belongs to
    input ``order[k]``. ``mean`` bfloat16 [in_features] is added to every row of the weight, or None.
    """

    tiles: Tensor
    order: Tensor | None
    centres: Tensor | None
    nearest: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bits: int, group_size: int, table: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.group_size = group_size
        kernel_group = kernel_group_size(group_size)
        self.table_group = kernel_group if table or bits < 4 else 0
        shape = tile_shape(out_features, in_features, bits, kernel_group, table)
        self.register_buffer("tiles", torch.empty(shape, dtype=torch.uint8, device="meta"))
        for name in ("order", "centres", "nearest"):
            self.register_buffer(name, None)
        self.register_parameter("bias", None)

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, bias: nn.Parameter | None = None) -> QuantLinear:
        outputs, inputs = weight.q.shape
        module = cls(inputs, outputs, weight.bits, weight.group_size, weight.table is not None)
        module.tiles, module.centres, module.nearest = tile(weight), weight.centres, weight.nearest
        module.bias = bias
        return module

    @property
    def qweight(self) -> Tensor:
        """``tiles``, under the name that peft reads to place an adapter."""
        return self.tiles

    def to_weight(self) -> QuantizedWeight:
        """The weight that ``from_weight`` received, bit for bit, on the module's device.

        Its columns are those of ``tiles``: permuted if there is an ``order``.
        """
        weight = untile(self.tiles, self.out_features, self.bits, self.table_group)
        step = weight.scales.shape[1] * self.group_size // self.in_features
        scales = weight.scales[:, ::step].contiguous()
        return QuantizedWeight(weight.q, scales, self.bits, weight.table, self.centres, self.nearest)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out_features, in_features] as ``dtype``, with the columns of ``to_weight``."""
        if self.tiles.device.type != "cpu":
            weight = torch.ops.xverse.dequantize(
                self.tiles, self.out_features, self.bits, dtype, self.table_group
            )
            return add_centres(weight, self.centres, self.nearest)
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype)
        start = 0
        parts = ops.dequantized_parts(self.tiles, self.out_features, self.bits, dtype, self.table_group)
        for part in parts:
            weight[start : start + len(part)] = part
            start += len(part)
        return add_centres(weight, self.centres, self.nearest)

    def forward(self, x: Tensor) -> Tensor:
        if self.order is not None:
            x = x.index_select(-1, self.order)
        if torch.is_grad_enabled() and x.requires_grad:  # the kernels record no gradients
            y = ops.dequantized_linear(x, self.tiles, self.out_features, self.bits, self.table_group)
        else:
            run = ops.quant_linear if ops.is_eager_cpu(x) else torch.ops.xverse.quant_linear
            y = run(x, self.tiles, self.out_features, self.bits, self.table_group)
        if self.centres is not None and self.nearest is not None:
            y = y + central_products(x, self.centres).to(y.dtype).index_select(-1, self.nearest.int())
        return y if self.bias is None else y + self.bias

    @staticmethod
    def together(layers: Sequence[QuantLinear], x: Tensor) -> list[Tensor]:
        """``[layer(x) for layer in layers]``; quantises the input once if the layers have the same format."""
        first = layers[0]
        same_format = all(
            (layer.bits, layer.group_size, layer.table_group, layer.order, layer.centres)
            == (first.bits, first.group_size, first.table_group, None, None)
            and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)
            for layer in layers
        )
        if not same_format or (torch.is_grad_enabled() and x.requires_grad):
            return [layer(x) for layer in layers]
        run = ops.quant_linears if ops.is_eager_cpu(x) else torch.ops.xverse.quant_linears
        sizes = [layer.out_features for layer in layers]
        outputs = run(x, [layer.tiles for layer in layers], sizes, first.bits, first.table_group)
        biases = (layer.bias for layer in layers)
        return [y if bias is None else y + bias for y, bias in zip(outputs, biases, strict=True)]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}"
        )


def central_products(x: Tensor, centres: Tensor) -> Tensor:
    """``x`` [..., K] times the transpose of ``centres`` [C, K], float32 [..., C]: sums whose bits do not
    depend on the number of rows, as those of a matrix product would."""
    rows = x.flatten(0, -2).float().split(max(1, _PRODUCTS // centres.numel()))
    sums = torch.cat([(part[:, None] * centres).sum(dim=-1) for part in rows])
    return sums.view(*x.shape[:-1], len(centres))


class QuantEmbedding(nn.Module):
    """Token ids int64 [...] → ``dtype`` [..., D]; rows are dequantised when they are looked up.

    ``rows`` uint8 [V, D · bits / 8] in the layout of ``tiles.to_rows``, ``scales`` bfloat16 [V, D/group].
    """

    rows: Tensor
    scales: Tensor

    def __init__(self, rows: Tensor, scales: Tensor, bits: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.bits, self.dtype = bits, dtype
        self.register_buffer("rows", rows)
        self.register_buffer("scales", scales)

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, dtype: torch.dtype) -> QuantEmbedding:
        return cls(to_rows(weight), weight.scales, weight.bits, dtype)

    def to_weight(self) -> QuantizedWeight:
        return from_rows(self.rows, self.scales, self.bits)

    def forward(self, tokens: Tensor) -> Tensor:
        flat = tokens.flatten()
        weight = from_rows(self.rows[flat], self.scales[flat], self.bits)
        return weight.dequantize(torch.float32).to(self.dtype).view(*tokens.shape, -1)

    def extra_repr(self) -> str:
        return f"{self.scales.shape[0]}, {self.rows.shape[1] * 8 // self.bits}, bits={self.bits}"


def weights_kind(model: Any) -> str:
    """What the weights of a language model are: ``int4``, the fewest bits of its linears, or their dtype."""
    bits = [module.bits for module in model.modules() if isinstance(module, QuantLinear)]
    return f"int{min(bits)}" if bits else str(model.model.norm.weight.dtype).removeprefix("torch.")
