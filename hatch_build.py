"""Build hook: compile csrc/ to two shared libraries, for ``xverse.kernels`` and ``xverse.tokenizer``.

Without a compiler the package installs without them: it computes with PyTorch's operations (`xverse doctor`
reports which kernels are in use) and trains tokenizers with the ``tokenizers`` library. In a checkout,
``python hatch_build.py`` compiles them in place.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
KERNELS = "src/xverse/kernels/libxverse_kernels.so"
BPE = "src/xverse/tokenizer/libxverse_bpe.so"

# GCC 12's own intrinsics cause thousands of -Wmaybe-uninitialized warnings.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-psabi"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma"]
_AVX512 += ["-mprefer-vector-width=512"]
_ROUNDING = ["-ffp-contract=off"]  # every instruction set must give the same bits
# (source, flags of its instruction set). csrc/instruction_sets.cpp lists the tables that these units define.
UNITS: list[tuple[str, list[str]]] = [
    ("api.cpp", []),
    ("tiles.cpp", []),
    ("instruction_sets.cpp", []),
    ("portable.cpp", []),
    ("attention_api.cpp", []),
    ("fused_step.cpp", []),
    ("attention_generic.cpp", []),
    ("rounding.cpp", [*_ROUNDING, "-DXV_ROUND=round_portable"]),
    ("training_api.cpp", []),
    ("training.cpp", ["-DXV_TRAINING=kTrainingPortable"]),
]
if platform.machine().lower() in ("x86_64", "amd64"):
    UNITS += [
        ("avx2.cpp", ["-mavx2", "-mfma", "-mf16c"]),
        ("avx2.cpp", ["-mavx2", "-mfma", "-mf16c", "-mavxvnni"]),
        ("avx512.cpp", _AVX512),
        ("avx512.cpp", [*_AVX512, "-mavx512bf16"]),
        ("attention_generic.cpp", ["-mavx2", "-mfma", "-mf16c"]),
        ("attention_avx512.cpp", _AVX512),
        ("attention_avx512.cpp", [*_AVX512, "-mavx512bf16"]),
        ("attention_prefill.cpp", [*_AVX512, "-mavx512bf16"]),
        ("training_attention.cpp", [*_AVX512, "-mavx512bf16"]),
        ("rounding.cpp", [*_ROUNDING, "-mavx2", "-DXV_ROUND=round_avx2"]),
        ("rounding.cpp", [*_ROUNDING, *_AVX512, "-DXV_ROUND=round_avx512"]),
        ("training.cpp", ["-mavx2", "-mfma", "-DXV_TRAINING=kTrainingAvx2"]),
        ("training.cpp", [*_AVX512, "-DXV_TRAINING=kTrainingAvx512"]),
    ]
elif platform.machine().lower() in ("aarch64", "arm64"):
    UNITS += [
        ("neon.cpp", ["-march=armv8.2-a+dotprod"]),
        ("neon.cpp", ["-march=armv8.2-a+dotprod+i8mm"]),
        ("neon.cpp", ["-march=armv8.2-a+dotprod+i8mm+bf16"]),
    ]
LIBRARIES = {
    KERNELS: UNITS,
    BPE: [("words.cpp", []), ("bpe.cpp", ["-pthread"]), ("encode.cpp", ["-pthread"])],
}


def compiler() -> list[str] | None:
    """The command of the C++ compiler: $CXX, or the first of c++, g++ and clang++ that exists."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    name = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    return [name] if name else None


def _run(command: list[str]) -> str | None:
    """Run a command of the compilation; returns its error, or None."""
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    return f"{shlex.join(command)}\n{result.stderr.strip()}" if result.returncode else None


def compile_library(target: Path, units: list[tuple[str, list[str]]]) -> str | None:
    """Compile sources of csrc/ to the library ``target``; returns the error, or None."""
    command = compiler()
    if command is None:
        return "no C++ compiler (c++, g++ or clang++) was found"
    with tempfile.TemporaryDirectory() as folder:
        objects = [str(Path(folder) / f"{number}.o") for number in range(len(units))]
        steps = [
            [*command, *FLAGS, *flags, "-c", str(ROOT / "csrc" / source), "-o", output]
            for (source, flags), output in zip(units, objects, strict=True)
        ]
        library = str(Path(folder) / "library.so")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            problem = next(filter(None, pool.map(_run, steps)), None)
        problem = problem or _run([*command, "-shared", "-pthread", *objects, "-o", library])
        if problem is not None:
            return problem
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced by a rename: a process that has the old file mapped keeps it.
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copyfile(library, temporary)
        temporary.replace(target)
    return None


def compile_all() -> str | None:
    """Compile every library in the checkout; returns the first error, or None."""
    problems = (compile_library(ROOT / library, units) for library, units in LIBRARIES.items())
    return next((problem for problem in problems if problem is not None), None)


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script, without hatchling
    BuildHookInterface = object  # type: ignore[assignment,misc]


class KernelBuildHook(BuildHookInterface):  # type: ignore[misc]
    """Hatchling calls ``initialize`` for wheels and editable installs."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        problem = compile_all()
        if problem is not None:
            if version == "editable":
                for library in LIBRARIES:  # those of an earlier version would not match
                    (ROOT / library).unlink(missing_ok=True)
            self.app.display_warning(f"xverse: installed without its fast CPU kernels: {problem}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["artifacts"] += LIBRARIES


if __name__ == "__main__":
    sys.exit(compile_all())
