"""An embedding whose rows stay in the model's file: what a look-up made resident is given back after it.

A token needs one row, but the kernel maps 64 kB around each page that is touched, so that a long prompt would
make hundreds of megabytes resident, at 7B as much as five per cent of the INT4 model.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor, nn

from xverse import hardware

_FEW = 16  # tokens whose pages may stay
_DONTNEED = getattr(mmap, "MADV_DONTNEED", None)


class MappedEmbedding(nn.Embedding):
    """``nn.Embedding`` over a mapped file.

    A weight that was written to, or is no mapped file any more (the module was copied, moved or converted),
    is kept like any other. Writing through ``weight.data`` goes unnoticed, and is lost.
    """

    unwritten: int

    def forward(self, tokens: Tensor) -> Tensor:
        rows = super().forward(tokens)
        # Asked of the system each time: giving back memory that is no file would destroy it.
        if tokens.numel() > _FEW and self.weight._version == self.unwritten and _is_mapped(self.weight):
            release(self.weight, known=True)
        return rows


def keep_in_file(embedding: nn.Embedding) -> None:
    """Make it a ``MappedEmbedding`` where its weight is a mapped file, on Linux; elsewhere leave it."""
    weight = embedding.weight
    if type(embedding) is not nn.Embedding or weight.is_inference() or not _is_mapped(weight):
        return  # tensors of inference mode do not tell whether they were written to
    embedding.__class__ = MappedEmbedding
    weight.requires_grad_(False)
    embedding.unwritten = weight._version  # type: ignore[assignment]  # of the class that it is now


def _is_mapped(weight: Tensor) -> bool:
    """Whether all of it lies in one mapping of a file."""
    if torch.compiler.is_compiling() or _DONTNEED is None or weight.device.type != "cpu":
        return False
    return hardware.file_mapped(weight.data_ptr(), weight.data_ptr() + weight.nbytes)


def release(weight: Tensor, known: bool = False) -> None:
    """Give back what is resident of a tensor in a mapped file, which nobody may have written to; its bytes
    are read anew when they are asked for. Other tensors are left alone (``known``: it is one)."""
    if not known and not _is_mapped(weight):
        return
    page = mmap.PAGESIZE
    start = -(-weight.data_ptr() // page) * page
    length = (weight.data_ptr() + weight.nbytes) // page * page - start
    if length > 0:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(_DONTNEED or 0))
