"""The compiled kernels (csrc/): found, matched to this processor, given PyTorch's threads.

``XVERSE_KERNELS`` names an instruction set (avx512_bf16, avx512_vnni, avx2, portable) instead of the best
one, or ``none`` for PyTorch's operations alone.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch

from xverse.config import UserError
from xverse.log import notice

LIBRARY = Path(__file__).with_name("libxverse_kernels.so")
NAMES = ("avx512_bf16", "avx512_vnni", "avx2", "portable")

_POINTER, _INT64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
# fmt: off
_SIGNATURES = {
    "xv_use_openmp": [_POINTER],
    "xv_use_huge_pages": [_POINTER, _INT64],
    "xv_quant_linear": [
        _POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT, _INT64, _INT64, _INT, _INT, _INT,
    ],
    "xv_linear_bf16": [_POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT64, _INT],
    "xv_round": [
        _POINTER, _POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT, _INT, _POINTER, _INT, _INT,
    ],
    "xv_rms_norm": [_POINTER, _POINTER, _POINTER, _INT, _INT, _INT64, _INT64, ctypes.c_float, _INT],
    "xv_silu_mul": [_POINTER, _POINTER, _POINTER, _INT, _INT64, _INT],
    "xv_rotate": [_POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT64, _INT, _INT, _INT],
    "xv_select_attention": [ctypes.c_char_p],
    "xv_has_prefill": [],
    "xv_paged_append": [*[_POINTER] * 4, _INT, *[_INT64] * 5, _INT],
    "xv_paged_attention": [*[_POINTER] * 5, _INT, *[_INT64] * 4, _INT],
    "xv_paged_prefill": [*[_POINTER] * 4, *[_INT64] * 4, _INT],
    "xv_decoder": [
        _POINTER, _INT, *[_POINTER] * 7, _INT, _INT, *[_INT64] * 3, _INT, _INT64, ctypes.c_float, _INT,
    ],
    "xv_select_training": [ctypes.c_char_p],
    "xv_train_add": [*[_POINTER] * 3, _INT64, _INT],
    "xv_train_accumulate": [*[_POINTER] * 2, _INT64, _INT],
    "xv_train_norm": [*[_POINTER] * 6, _INT, *[_INT64] * 2, ctypes.c_float, _INT],
    "xv_train_norm_grad": [*[_POINTER] * 8, _INT, *[_INT64] * 2, _INT],
    "xv_train_silu_mul_grad": [*[_POINTER] * 5, _INT64, _INT],
    "xv_train_turn": [*[_POINTER] * 4, *[_INT64] * 4, _INT, _INT],
    "xv_train_softmax": [*[_POINTER] * 3, *[_INT64] * 7, ctypes.c_float, _INT],
    "xv_train_softmax_grad": [*[_POINTER] * 4, *[_INT64] * 7, ctypes.c_float, _INT],
    "xv_has_train_attention": [_INT64],
    "xv_train_attention": [*[_POINTER] * 6, *[_INT64] * 4, _INT],
    "xv_train_attention_grad": [*[_POINTER] * 10, *[_INT64] * 4, _INT],
    "xv_train_cross_entropy": [*[_POINTER] * 3, *[_INT64] * 2, ctypes.c_float, _INT],
    "xv_tile": [_POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT, _INT, _INT],
    "xv_dequantize": [_POINTER, _POINTER, _INT, _INT64, _INT64, _INT, _INT, _INT],
}
# fmt: on


def library() -> ctypes.CDLL | None:
    """The kernels, or None where they were not compiled or are turned off.

    Raises UserError where ``XVERSE_KERNELS`` names none that this machine runs.
    """
    return _load()[0]


def kernel_name() -> str:
    """The instruction set in use, or ``torch`` where the kernels are not there."""
    return _load()[1]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    wanted = os.environ.get("XVERSE_KERNELS", "")
    if wanted == "none":
        return None, "torch"
    if wanted and wanted not in NAMES:
        raise UserError(f"XVERSE_KERNELS: '{wanted}' is not one of {', '.join(NAMES)}, none")
    try:
        found = ctypes.CDLL(str(LIBRARY))
    except OSError:
        notice(
            "xverse was installed without its compiled CPU kernels (no C++ compiler then): "
            "quantised layers compute with PyTorch's operations, which is slower"
        )
        return None, "torch"
    for name, arguments in _SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, None
    found.xv_has_train_attention.restype = _INT
    found.xv_select.argtypes, found.xv_select.restype = [ctypes.c_char_p], ctypes.c_char_p
    name = found.xv_select(wanted.encode())
    if name is None:
        raise UserError(f"XVERSE_KERNELS: this processor does not have '{wanted}'")
    found.xv_select_training(name)
    found.xv_use_openmp(_gomp_parallel())
    return found, name.decode()


def _gomp_parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP library that PyTorch runs on; None: one thread."""
    # torch's own copy lies beside its other libraries; asking for it by path finds the one already loaded.
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
