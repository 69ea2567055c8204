"""Launches, bytes and FLOPs of code on a CUDA device, counted without one: the code runs on fake tensors,
which have shapes and a device but no memory, under a dispatch mode that sees every operation.

An operation that allocates nothing and launches nothing (a view, an empty tensor) counts nothing; any other
counts one launch, or those in ``_LAUNCHES``, and moves its inputs and outputs once. Exceptions: a look-up
reads the rows that it returns, attention over a paged cache reads the positions of its sequences, and a
product with more tokens than the kernel takes writes and reads the dequantised weight.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from xverse import gpu
from xverse.kernels import inference

_FREE = (
    "device",
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "detach",
    "alias",
    "sym_size",
    "scalar_tensor",
)
_LAUNCHES = {"paged_append": 2, "paged_attention": 2, "_varlen_attn": 2, "_varlen_attn_backward": 3}
_ROWS = ("embedding", "index_select", "gather", "index")
_PRODUCT_TOKENS = 64  # beyond, kernels/gpu/linear.py dequantises


@dataclass
class Counter(TorchDispatchMode):
    """Counts what runs under it. ``positions`` are those of all sequences together that paged attention reads
    in one layer."""

    positions: int = 0
    launches: int = 0
    bytes: int = 0
    flops: int = 0
    by_name: dict[str, tuple[int, int]] = field(default_factory=dict)  # launches, bytes

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if name in _FREE or func.is_view or (outputs and all(x.device.type != "cuda" for x in outputs)):
            return result
        if name == "_unsafe_view" or (name == "_to_copy" and inputs[0].dtype == outputs[0].dtype):
            return result
        moved = self._moved(name, args, inputs, outputs)
        launches = _LAUNCHES.get(name, len(outputs) if name == "quant_linears" else 1)
        self.launches += launches
        self.bytes += moved
        before = self.by_name.get(name, (0, 0))
        self.by_name[name] = (before[0] + launches, before[1] + moved)
        if name in ("mm", "addmm", "bmm"):
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        return result

    def _moved(self, name: str, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
        written = sum(map(size, outputs))
        if name in _ROWS:
            return 2 * written
        if name == "scatter_add_":
            return 3 * size(args[2])  # an index, and a value read and written for each
        if name == "copy_":
            return size(args[1]) + written
        if name == "paged_append":
            return 2 * sum(map(size, args[:2]))
        paged = (
            name == "_varlen_attn" and len(args) > 12 and args[12] is not None
        ) or name == "paged_attention"
        if paged:
            keys = args[1]
            heads, head_dim = args[0].shape[1], args[0].shape[2]
            scale = 4 if keys.dtype == torch.int8 else 0
            return size(args[0]) + written + 2 * heads * (head_dim * keys.itemsize + scale) * self.positions
        moved = sum(map(size, inputs)) + written
        if (
            name in ("quant_linear", "quant_linears")
            and args[0].numel() // args[0].shape[-1] > _PRODUCT_TOKENS
        ):
            moved += 2 * sum(2 * y.shape[-1] * args[0].shape[-1] for y in outputs)
        return moved


def size(x: Tensor) -> int:
    """Bytes of a tensor; an expanded dimension counts once."""
    return (
        math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or n == 0) * x.itemsize
    )


@functools.cache
def _register_guard() -> None:
    """Compile and load ``guard.cpp``, unless PyTorch was built with CUDA."""
    if torch.version.cuda:
        return
    source = Path(__file__).with_name("guard.cpp")
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "guard.so"
        options = f"-std=c++20 -O0 -shared -fPIC -I{root}/include -L{root}/lib".split()
        subprocess.run(["c++", *options, str(source), "-lc10", "-o", str(library)], check=True)
        ctypes.CDLL(str(library))


@contextlib.contextmanager
def pretended_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Fake tensors, and a GPU of this ``capability`` with Triton. Gradients are not recorded: PyTorch's
    engine would look for the device."""
    _register_guard()
    with (
        mock.patch.object(gpu, "capability", return_value=capability),
        mock.patch.object(inference, "has_triton", return_value=True),
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
    ):
        yield
