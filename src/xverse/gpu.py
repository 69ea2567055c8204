"""What a CUDA device and the installed PyTorch can do, asked in one place so that every fallback agrees."""

from __future__ import annotations

import functools
import importlib.util
import inspect

import torch

MATRIX_UNITS = (8, 0)  # for bfloat16; FlashAttention-2 needs them, too


@functools.cache
def capability(index: int = 0) -> tuple[int, int]:
    """The compute capability of CUDA device ``index``."""
    return torch.cuda.get_device_capability(index)


def capability_of(device: torch.device) -> tuple[int, int]:
    """The compute capability of a ``device``; (0, 0) if it is not a CUDA device."""
    return capability(device.index or 0) if device.type == "cuda" else (0, 0)


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed. PyTorch's CUDA builds for Linux depend on it."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:  # before PyTorch 2.10
        return frozenset()
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def has_varlen(device: torch.device, dtype: torch.dtype, head_dim: int, paged: bool = False) -> bool:
    """Whether ``varlen_attn`` computes attention in ``dtype`` on ``device``: packed sequences since PyTorch
    2.11, ``paged`` caches since 2.13 (in pages of ``VARLEN_PAGE``)."""
    needed = {"block_table", "seqused_k"} if paged else {"window_size"}
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and needed <= _varlen_parameters()
        and not torch.version.hip  # whose kernels have not been tried
        and capability_of(device) >= MATRIX_UNITS
    )


VARLEN_PAGE = 256  # FlashAttention-2 refuses pages that are not a multiple of it
