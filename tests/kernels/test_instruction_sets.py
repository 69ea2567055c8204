"""Instruction sets that this machine may lack: their integer sums by emulation, and their documentation."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.scale import ALL
from xverse.kernels.linear import QuantLinear
from xverse.kernels.native import NAMES, kernel_name, library
from xverse.kernels.weight import QuantizedWeight

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
NATIVE = Path(__file__).parent / "native"
FLAGS = ["-std=c++17", "-O1", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]


def build(compiler: str, units: list[tuple[str, list[str]]], sets: str, folder: Path) -> Path:
    """The program of native/products.cpp with these units of csrc/ and tables."""
    program = folder / "products"
    objects = []
    for number, (source, flags) in enumerate(units):
        objects.append(str(folder / f"{number}.o"))
        command = [compiler, *FLAGS, *flags, "-c", str(SOURCES / source), "-o", objects[-1]]
        subprocess.run(command, check=True)
    driver = [str(NATIVE / "products.cpp"), f"-DXV_SETS={sets}", "-static", "-o", str(program)]
    subprocess.run([compiler, "-std=c++17", *driver, *objects], check=True)
    return program


@pytest.mark.parametrize(
    ("header", "source", "name", "table", "shapes"),
    [
        ("emulated_vnni.h", "avx2.cpp", "avx_vnni", "kAvxVnni", 432),
        pytest.param(
            *("emulated_avx512.h", "avx512.cpp", "avx512_vnni", "kAvx512", 432), marks=pytest.mark.thorough
        ),
        pytest.param(
            *("emulated_amx.h", "avx512.cpp", "avx512_amx", "kAvx512Amx", 1032), marks=pytest.mark.thorough
        ),
    ],
)
def test_x86_sums_by_emulation(
    header: str, source: str, name: str, table: str, shapes: int, tmp_path: Path
) -> None:
    compiled = library()
    compiler = shutil.which("g++")
    if compiled is None or compiler is None or compiled.xv_select(b"avx2") is None:
        pytest.skip("needs g++ and AVX2")
    compiled.xv_select(kernel_name().encode())
    flags = ["-mavx2", "-mfma", "-include", str(NATIVE / header)]
    program = build(compiler, [(source, flags)], f'{{"{name}",&{table}}}', tmp_path)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{name}: {shapes} shapes equal\n")


def test_arm_sums_by_emulation(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs Debian's g++-aarch64-linux-gnu and qemu-user")
    units = [
        ("portable", "kPortable", "portable.cpp", []),
        ("neon_dot", "kNeonDot", "neon.cpp", ["-march=armv8.2-a+dotprod"]),
        ("neon_i8mm", "kNeonI8mm", "neon.cpp", ["-march=armv8.2-a+dotprod+i8mm"]),
        ("neon_bf16", "kNeonBf16", "neon.cpp", ["-march=armv8.2-a+dotprod+i8mm+bf16"]),
    ]
    if not ALL:
        units = units[1:2]
    sets = ",".join(f'{{"{name}",&{table}}}' for name, table, _, _ in units)
    program = build(compiler, [unit[2:] for unit in units], sets, tmp_path)
    done = subprocess.run([emulator, "-cpu", "max", program], capture_output=True, text=True, timeout=120)
    said = "".join(f"{name}: 432 shapes equal\n" for name, *_ in units)
    assert (done.returncode, done.stdout) == (0, said)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_integer_sums_are_exact(kernels: str, bits: int, group: int) -> None:
    """Scales are 1 and inputs are integers that quantising keeps: the product is the sum of integers."""
    generator = torch.Generator().manual_seed(group)
    half = 1 << (bits - 1)
    q = torch.randint(-half, half, (70, 3 * group), dtype=torch.int8, generator=generator)
    q[:3] = -half  # the largest magnitudes, with inputs of one sign below: nothing overflows
    layer = QuantLinear.from_weight(QuantizedWeight(q, torch.ones(70, 3).bfloat16(), bits))
    for tokens in range(1, 14):
        x = torch.randint(-127, 128, (tokens, 3 * group), generator=generator)
        x[0] = 127
        x[:, ::group] = -127
        result = layer(x.float())
        assert torch.equal(result.long(), x @ q.long().T), (kernels, tokens)


def rows() -> dict[str, list[str]]:
    """The rows of kInstructionSets: the fields after the name."""
    source = (SOURCES / "instruction_sets.cpp").read_text()
    table = source[source.index("kInstructionSets[] = {") :]
    found = re.findall(r'\{"(\w+)",([^}]*)\}', table)
    return {name: [field.strip() for field in fields.split(",")] for name, fields in found}


def test_names_and_their_order_are_those_of_the_table() -> None:
    assert tuple(rows()) == NAMES


def test_the_documentation_lists_every_set_and_what_it_lacks() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text()
    documented = {
        cells[0].strip("` "): [cell.strip() for cell in cells[1:]]
        for line in page.splitlines()
        if (cells := line.strip("|").split("|"))[0].strip().startswith("`") and len(cells) > 4
    }
    assert tuple(documented) == NAMES
    for name, fields in rows().items():
        assert ("nullptr" in fields) == ("PyTorch" in documented[name]), name
