"""An embedding whose rows stay in the model's file: pages that a lookup made resident are released after it.

A token needs one row, but the kernel maps 64 kB around each touched page, so a long prompt would make
hundreds of megabytes resident, at 7B up to 5 % of the INT4 model.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor, nn

from xverse import hardware

_FEW = 16  # tokens whose pages may stay resident
_DONTNEED = getattr(mmap, "MADV_DONTNEED", None)


class MappedEmbedding(nn.Embedding):
    """``nn.Embedding`` over a mapped file.

    A weight that was written to or is no longer mapped (the module was copied, moved or converted) is left
    alone. Writes through ``weight.data`` are not detected and get lost.
    """

    unwritten: int

    def forward(self, tokens: Tensor) -> Tensor:
        rows = super().forward(tokens)
        # Checked each time: releasing memory that is not backed by a file would destroy it.
        if tokens.numel() > _FEW and self.weight._version == self.unwritten and _is_mapped(self.weight):
            release(self.weight, known=True)
        return rows


def keep_in_file(embedding: nn.Embedding) -> None:
    """Turn it into a ``MappedEmbedding`` if its weight is a mapped file, on Linux."""
    weight = embedding.weight
    if type(embedding) is not nn.Embedding or weight.is_inference() or not _is_mapped(weight):
        return  # inference tensors have no version counter
    embedding.__class__ = MappedEmbedding
    weight.requires_grad_(False)
    embedding.unwritten = weight._version  # type: ignore[assignment]  # of its new class


def _is_mapped(weight: Tensor) -> bool:
    """Whether the whole tensor is in one mapping of a file."""
    if torch.compiler.is_compiling() or _DONTNEED is None or weight.device.type != "cpu":
        return False
    return hardware.file_mapped(weight.data_ptr(), weight.data_ptr() + weight.nbytes)


def release(weight: Tensor, known: bool = False) -> None:
    """Release the resident pages of a tensor in a mapped file, to which nothing may have been written; they
    are read again on access. Other tensors are left alone (``known`` skips the check)."""
    if not known and not _is_mapped(weight):
        return
    page = mmap.PAGESIZE
    start = -(-weight.data_ptr() // page) * page
    length = (weight.data_ptr() + weight.nbytes) // page * page - start
    if length > 0:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(_DONTNEED or 0))
