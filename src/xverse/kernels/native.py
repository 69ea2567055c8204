"""The compiled kernels: loads the library, selects an instruction set and runs it on PyTorch's threads.

This module binds everything that ``csrc/xverse_kernels.h`` declares; that header documents the functions.
``XVERSE_KERNELS`` selects an instruction set (one of ``NAMES``) instead of the best one, or with ``none``
PyTorch's operations.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xverse.config import UserError
from xverse.log import notice

LIBRARY = Path(__file__).with_name("libxverse_kernels.so")
# As in csrc/instruction_sets.cpp, best first.
NAMES = (
    *("avx512_amx", "avx512_bf16", "avx512_vnni", "avx_vnni", "avx2"),
    *("neon_bf16", "neon_i8mm", "neon_dot", "portable"),
)

# XvType: the types of activations, and those of a cache
TYPES = {torch.float32: 0, torch.bfloat16: 1}
CACHE_TYPES = TYPES | {torch.int8: 2}
TABLE_FORMAT = 16  # XvFormat: added to the bits of a weight with a table

_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class Cache(ctypes.Structure):
    """``XvCache``: the keys and values of one layer."""

    _fields_ = (
        *((name, _POINTER) for name in ("keys", "values", "key_scales", "value_scales")),
        *((f"{name}_stride", _INT64) for name in ("key", "value", "key_scale", "value_scale")),
        *((name, _INT) for name in ("type", "heads", "block_size", "head_dim")),
    )


class Weight(ctypes.Structure):
    """``XvWeight``: the weight of a linear layer."""

    _fields_ = (("data", _POINTER), ("outputs", _INT64), ("format", _INT), ("group", _INT))


class Lora(ctypes.Structure):
    """``XvLora``: what an adapter adds to a linear layer."""

    _fields_ = (("a", _POINTER), ("b", _POINTER), ("rank", _INT64))


class Layer(ctypes.Structure):
    """``XvLayer``: the weights and the cache of a decoder layer."""

    _fields_ = (
        *((name, Weight) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, _POINTER) for name in ("attention_norm", "mlp_norm", "cache")),
    )


# Each function's arguments; RESULTS has those that return something.
# fmt: off
SIGNATURES = {
    "xv_select": [ctypes.c_char_p],
    "xv_use_openmp": [_POINTER],
    "xv_use_huge_pages": [_POINTER, _INT64],
    "xv_quant_linear": [*[_POINTER] * 4, _INT, _INT, _INT64, _INT64, _INT, _INT, _INT],
    "xv_tile": [*[_POINTER] * 4, _INT64, _INT64, _INT, _INT, _INT],
    "xv_dequantize": [_POINTER, _POINTER, _INT, _INT64, _INT64, _INT, _INT, _INT],
    "xv_round": [*[_POINTER] * 4, _INT64, _INT64, _INT, _POINTER, _INT, _POINTER, _INT, _INT],
    "xv_round_columns": [*[_POINTER] * 7, *[_INT64] * 3, _INT, _INT, _POINTER, _INT],
    "xv_linear": [*[_POINTER] * 3, _INT, *[_INT64] * 3, _INT],
    "xv_lora": [*[_POINTER] * 3, _INT, _POINTER, _INT, _POINTER, _INT, _INT64, _INT],
    "xv_rms_norm": [*[_POINTER] * 3, _INT, _INT, _INT64, _INT64, _FLOAT, _INT],
    "xv_silu_mul": [*[_POINTER] * 3, _INT, _INT64, _INT],
    "xv_rotate": [*[_POINTER] * 4, _INT, _INT64, *[_INT] * 4],
    "xv_paged_append": [*[_POINTER] * 4, _INT, *[_INT64] * 5, _INT],
    "xv_paged_attention": [*[_POINTER] * 5, _INT, *[_INT64] * 4, _INT, _INT],
    "xv_paged_prefill": [*[_POINTER] * 4, *[_INT64] * 4, _INT, _INT],
    "xv_fused_step": [
        *[_POINTER, _INT, *[_POINTER] * 7, _INT, _INT, *[_INT64] * 3, _INT, _INT64, _FLOAT],
        *[_POINTER, _INT, _POINTER, _INT],
    ],
    "xv_train_add": [*[_POINTER] * 3, _INT64, _INT],
    "xv_train_accumulate": [*[_POINTER] * 2, _INT64, _INT],
    "xv_train_norm": [*[_POINTER] * 6, _INT, *[_INT64] * 2, _FLOAT, _INT],
    "xv_train_norm_grad": [*[_POINTER] * 8, _INT, *[_INT64] * 2, _INT],
    "xv_train_silu_mul_grad": [*[_POINTER] * 5, _INT64, _INT],
    "xv_train_rotate": [*[_POINTER] * 4, *[_INT64] * 4, _INT, _INT],
    "xv_train_softmax": [*[_POINTER] * 3, *[_INT64] * 7, _FLOAT, _INT],
    "xv_train_softmax_grad": [*[_POINTER] * 4, *[_INT64] * 7, _FLOAT, _INT],
    "xv_has_train_attention": [_INT64],
    "xv_train_attention": [*[_POINTER] * 6, *[_INT64] * 4, _INT],
    "xv_train_attention_grad": [*[_POINTER] * 10, *[_INT64] * 4, _INT],
    "xv_train_cross_entropy": [*[_POINTER] * 3, *[_INT64] * 2, _FLOAT, _INT],
}
# fmt: on
RESULTS = {"xv_select": ctypes.c_char_p, "xv_has_train_attention": _INT}


def library() -> ctypes.CDLL | None:
    """The kernels, or None if they were not compiled or are turned off.

    Raises UserError if ``XVERSE_KERNELS`` names an instruction set that this machine does not run.
    """
    return _load()[0]


def call(name: str, *arguments: Any) -> None:
    """Call a kernel with the addresses of tensors, and last PyTorch's number of threads."""
    values = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    getattr(library(), name)(*values, torch.get_num_threads())


def kernel_name() -> str:
    """The instruction set in use, or ``torch`` without the kernels."""
    return _load()[1]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    selected = os.environ.get("XVERSE_KERNELS", "")
    if selected == "none":
        return None, "torch"
    if selected and selected not in NAMES:
        raise UserError(f"XVERSE_KERNELS: '{selected}' is not one of {', '.join(NAMES)}, none")
    try:
        kernels = ctypes.CDLL(str(LIBRARY))
    except OSError:
        notice(
            "xverse was installed without its compiled CPU kernels (there was no C++ compiler): "
            "quantised layers compute with PyTorch's operations, which is slower"
        )
        return None, "torch"
    if missing := next((name for name in SIGNATURES if not hasattr(kernels, name)), None):
        notice(
            f"the compiled CPU kernels are older than the package (no {missing}); python hatch_build.py"
            " compiles them again; until then layers compute with PyTorch's operations, which is slower"
        )
        return None, "torch"
    for name, arguments in SIGNATURES.items():
        function = getattr(kernels, name)
        function.argtypes, function.restype = arguments, RESULTS.get(name)
    name = kernels.xv_select(selected.encode())
    if name is None:
        raise UserError(f"XVERSE_KERNELS: this processor does not have '{selected}'")
    kernels.xv_use_openmp(_gomp_parallel())
    return kernels, name.decode()


def _gomp_parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP library that PyTorch uses; None: run on one thread."""
    # By path, because torch loads a copy from its own folder; opening that path again returns the loaded one.
    folder = Path(torch.__file__).parent / "lib"
    candidates = [*folder.glob("libgomp*"), *folder.glob("libomp*"), *folder.glob("libiomp5*")]
    bundled = folder.parent.parent / "torch.libs"
    candidates += [*bundled.glob("libgomp*")] if bundled.is_dir() else []
    for path in (*map(str, candidates), None):
        try:
            function = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None
