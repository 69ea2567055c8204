"""Products of bfloat16 matrices on CPUs for which PyTorch has no fast ones, by conversion to float32.

oneDNN multiplies bfloat16 matrices with AVX-512 or newer, and with Arm's bf16 extension. Elsewhere PyTorch
falls back to loops up to a hundred times slower than its float32 products. There, ``use_fast_products``
replaces PyTorch's CPU kernels of matrix products and of fused attention in this process. A call with bfloat16
operands converts them to float32, multiplies and rounds the result once: what the fast kernels compute, up to
the order of the sums. Other calls go on to PyTorch's kernels, a few microseconds later. Layers, adapters,
losses, backward passes and optimizers need no code of their own: PyTorch's dispatcher brings them all here.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_PART = 2**22  # values of an operand, or of a result, that exist in float32 at one time: 16 MiB

# Operations, and how many terms before the two factors are added to the product.
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def has_fast_products() -> bool:
    """Whether PyTorch has fast products of bfloat16 matrices on this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def conversion_bytes() -> int:
    """Bytes that a product by conversion takes besides its operands: parts of both, and of the result."""
    return 0 if has_fast_products() or _unwanted() else 3 * 4 * _PART


def product_name() -> str:
    """How xverse multiplies bfloat16 matrices on this CPU."""
    if has_fast_products():
        return "PyTorch's"
    if _unwanted():
        return "PyTorch's, slow here"
    return "by conversion to float32, for want of fast ones in PyTorch"


def _unwanted() -> bool:
    return os.environ.get("XVERSE_KERNELS") == "none"  # PyTorch's operations were asked for


@functools.cache
def use_fast_products() -> torch.library.Library | None:
    """Makes products of bfloat16 matrices on the CPU fast; called wherever a model computes in bfloat16.
    Returns the replacements, or None where PyTorch needs none."""
    return None if has_fast_products() or _unwanted() else register()


def prepare_products(x: Tensor) -> None:
    """``use_fast_products`` if a model with the input ``x`` multiplies in bfloat16 on the CPU."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        if autocast or x.dtype == torch.bfloat16:
            use_fast_products()


def register() -> torch.library.Library:
    """Replace PyTorch's CPU kernels; destroying the result restores them."""
    library = torch.library.Library("aten", "IMPL")
    functions: dict[str, Callable[..., Any]] = {}
    for name, terms in _PRODUCTS.items():
        for overload in (name, f"{name}.out", *[f"{name}_"] * terms):
            functions[overload] = _product(name, overload)
    for name in (_ATTENTION, f"{_ATTENTION}_backward"):
        functions[name] = _attention(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that a kernel is replaced
        for name, function in functions.items():
            library.impl(name, function, "CPU", with_keyset=True)
    return library


def _kernel(name: str) -> Any:
    return torch.library.get_kernel(f"aten::{name}", "CPU")


def _product(name: str, overload: str) -> Callable[..., Tensor]:
    """The replacement of one overload of an operation: functional, with ``out``, or in place."""
    original, multiply = _kernel(overload), _kernel(name)

    def run(keys: Any, *operands: Tensor, out: Tensor | None = None, **scalars: Any) -> Tensor:
        *terms, a, b = operands
        if a.dtype != torch.bfloat16 or not _fit(terms, a, b):
            if out is not None:
                scalars["out"] = out
            return original.call_boxed(keys, *operands, **scalars)
        shape = (*a.shape[:-1], b.shape[-1])
        if overload.endswith("_"):
            out = operands[0]
        elif out is None:
            out = a.new_empty(shape)
        elif out.shape != shape:
            out.resize_(shape)
        terms = [term.expand(shape) for term in terms]
        for of_a, of_b, of_out in _parts(a, b):
            factors = [term[of_out].float() for term in terms] + [a[of_a].float(), b[of_b].float()]
            out[of_out] = multiply.call_boxed(keys, *factors, **scalars)
        return out

    return run


def _fit(terms: list[Tensor], a: Tensor, b: Tensor) -> bool:
    """Whether the operands are all bfloat16 and have matching shapes; PyTorch explains why others do not."""
    matching = a.dim() == b.dim() and a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2]
    return matching and all(x.dtype == torch.bfloat16 for x in (b, *terms))


_Index = tuple[slice, ...]


def _parts(a: Tensor, b: Tensor) -> Iterator[tuple[_Index, _Index, _Index]]:
    """Parts of a product ``a`` [M, K] @ ``b`` [K, N], or of a batch [B, …] of them: a part's indices in
    ``a``, in ``b`` and in the result."""
    rows, inner, columns = a.shape[-2], max(1, a.shape[-1]), b.shape[-1]
    if a.dim() == 3:
        for one in _slices(len(a), max(rows * inner, inner * columns, rows * columns)):
            yield (one,), (one,), (one,)
        return
    for row in _slices(rows, inner):
        for column in _slices(columns, max(inner, row.stop - row.start)):
            yield (row,), (slice(None), column), (row, column)


def _slices(count: int, size: int) -> Iterator[slice]:
    """``count`` items of ``size`` values, in slices of up to ``_PART`` values but at least one item."""
    step = max(1, _PART // max(1, size))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _attention(name: str) -> Callable[..., tuple[Tensor, ...]]:
    """The replacement of fused attention, forward or backward; log-sums are float32 in both."""
    original = _kernel(name)

    def run(keys: Any, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        if arguments[0].dtype != torch.bfloat16:
            return original.call_boxed(keys, *arguments, **options)
        wide = [x.float() if isinstance(x, Tensor) else x for x in arguments]
        mask = options.get("attn_mask")
        if mask is not None and mask.dtype == torch.bfloat16:
            options["attn_mask"] = mask.float()
        results = original.call_boxed(keys, *wide, **options)
        if name == _ATTENTION:
            return results[0].to(torch.bfloat16), results[1]
        return tuple(x.to(torch.bfloat16) for x in results)

    return run
