"""What LoRA adapters add to linear layers, for tokens with different ones in a row (``csrc/lora.cpp``)."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence

from torch import Tensor

from xverse.kernels.native import TYPES, Lora, call, library

Factors = tuple[Tensor, Tensor]  # a [rank, K] and b [rank, N], the transpose of peft's B times its scale


def struct(factors: Factors | None) -> Lora:
    """The kernels' view of one layer's factors, which must not move; None: the layer stays as it is."""
    if factors is None:
        return Lora(None, None, 0)
    a, b = factors
    return Lora(a.data_ptr(), b.data_ptr(), len(a))


def pointers(tables: Sequence[ctypes.Array[Lora] | Lora]) -> ctypes.Array[ctypes.c_void_p]:
    """The addresses of arrays of ``Lora``, as the kernels take them."""
    return (ctypes.c_void_p * len(tables))(*map(ctypes.addressof, tables))


def bounds_of(segments: Sequence[tuple[int, int]]) -> ctypes.Array[ctypes.c_int64]:
    """The kernels' form of adjacent segments of tokens."""
    assert all(one[1] == following[0] for one, following in itertools.pairwise(segments))
    return (ctypes.c_int64 * (len(segments) + 1))(segments[0][0], *(end for _, end in segments))


def add_lora_(
    x: Tensor, y: Tensor, adapters: Sequence[Factors | None], segments: Sequence[tuple[int, int]]
) -> None:
    """Add to a linear layer's output ``y`` [N, out] of ``x`` [N, K] what ``adapters`` give, each for the
    tokens of its segment; the segments are adjacent. The bits of a token depend on that token alone."""
    usable = x.device.type == "cpu" and x.dtype in TYPES and y.is_contiguous()
    if not usable or library() is None:
        for factors, (begin, end) in zip(adapters, segments, strict=True):
            if factors is not None:
                a, b = factors
                y[begin:end] += (x[begin:end] @ a.T) @ b
        return
    structs = [struct(factors) for factors in adapters]
    outputs, sizes = (ctypes.c_void_p * 1)(y.data_ptr()), (ctypes.c_int64 * 1)(y.shape[1])
    call(
        "xv_lora", x.contiguous(), outputs, sizes, 1, pointers(structs), len(structs), bounds_of(segments),
        TYPES[x.dtype], x.shape[1],
    )  # fmt: skip
