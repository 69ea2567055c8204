"""The Triton kernels without a GPU: run by Triton's interpreter against PyTorch's operations, and compiled
for every generation of GPUs that they support."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.scale import ALL

triton = pytest.importorskip("triton")

GENERATIONS = (75, 80, 86, 89, 90, 120)
ALIKE = (86, 89)  # differ from 80 in shared memory and matrix units, so only what uses them is compiled

pytestmark = pytest.mark.slow


def test_kernels_in_the_interpreter() -> None:
    file = Path(__file__).with_name("interpreted_gpu_kernels.py")
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert run.stdout.startswith("......"), run.stdout[-500:]  # one for each test


BF16, I32, I64, F32, I8 = "*bf16", "i32", "*i64", "*fp32", "*i8"
LINEAR = {"x": BF16, "words": "*i32", "scales": BF16, "y": BF16, "out": BF16}
PAGED = {"rows": BF16, "slots": I64, "q": BF16, "table": "*i32", "lengths": "*i32", "parts": F32, "tops": F32}
PAGED |= {"sums": F32, "out": BF16, "scale": "fp32"}
PLAIN = {
    "pages": BF16,
    "keys": BF16,
    "values": BF16,
    "scales": BF16,
    "key_scales": BF16,
    "value_scales": BF16,
}
INT8 = {"pages": I8, "keys": I8, "values": I8, "scales": F32, "key_scales": F32, "value_scales": F32}
LAYER = dict.fromkeys(("x", "weight", "y", "gate", "up", "q", "k", "cos", "sin"), BF16) | {"eps": "fp32"}
SIZES = {"PAGE": 32, "BLOCK": 32, "D": 128, "WIDTH": 128, "QUADS": 32, "SPLITS": 32}
# Room, kernel, types of its arguments (others are int32), constants, and the first generation that runs it.
KERNELS = [
    *(
        ("linear", name, LINEAR, {"BITS": bits, "T": tokens, "BLOCK": 16, "TOKENS": 16, "OUTPUTS": 64}, first)
        for name, tokens, first in (
            ("few_tokens", 1, 75),
            ("many_tokens", 1, 80),
            ("dequantize_tiles", 1, 75),
        )
        for bits in (4, 8)
    ),
    ("attention", "append_rows", PAGED | PLAIN, {"INT8": False}, 75),
    ("attention", "append_rows", PAGED | INT8, {"INT8": True}, 75),
    ("attention", "attend_part", PAGED | PLAIN, {"INT8": False}, 75),
    ("attention", "attend_part", PAGED | INT8, {"INT8": True}, 75),
    ("attention", "merge_parts", PAGED, {}, 75),
    ("layers", "norm_rows", LAYER, {"D": 4096, "WIDTH": 4096}, 75),
    ("layers", "gate_values", LAYER, {"BLOCK": 1024}, 75),
    ("layers", "rotate_heads", LAYER, {"WIDTH": 64}, 75),
]


@pytest.mark.parametrize("generation", GENERATIONS if ALL else (75, *ALIKE, 90))
def test_kernels_compile_for(generation: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for room, name, types, constants, first in KERNELS:
        if generation < first or (generation in ALIKE and name not in ("many_tokens", "attend_part")):
            continue
        kernel: Any = getattr(importlib.import_module(f"xverse.kernels.gpu.{room}"), name)
        values = {key: value for key, value in (SIZES | constants).items() if key in kernel.arg_names}
        kinds = {key: "constexpr" if key in values else types.get(key, I32) for key in kernel.arg_names}
        source = ASTSource(
            kernel, kinds, {(kernel.arg_names.index(key),): value for key, value in values.items()}
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", generation, 32))
        assert compiled.asm["cubin"], name
        assert compiled.metadata.shared <= 64 * 1024, name  # what Turing has
