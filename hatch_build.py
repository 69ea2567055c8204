"""Build hook: compile csrc/ into shared libraries, kernels for ``xverse.quant`` and training for
``xverse.tokenizer``.

Without a compiler the package installs all the same: it computes with PyTorch's operations (`xverse doctor`
says which) and trains tokenizers with the ``tokenizers`` library. By hand: ``python hatch_build.py`` compiles
into the checkout.
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

# GCC 12's own intrinsics trip -Wmaybe-uninitialized thousands of times.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-psabi"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma"]
_AVX512 += ["-mprefer-vector-width=512"]
_ROUNDING = ["-ffp-contract=off"]  # every instruction set is to give the same bits
# (source, flags of its instruction set); each of the x86 files is empty for other processors
UNITS: list[tuple[str, list[str]]] = [
    ("api.cpp", []),
    ("portable.cpp", []),
    ("attention_api.cpp", []),
    ("decoder.cpp", []),
    ("attention_generic.cpp", []),
    ("rounding.cpp", [*_ROUNDING, "-DXV_ROUND=round_portable", "-DXV_ROUND_API"]),
    ("training_api.cpp", []),
    ("training.cpp", ["-DXV_TRAINING=kTrainingPortable"]),
]
if platform.machine().lower() in ("x86_64", "amd64"):
    UNITS += [
        ("avx2.cpp", ["-mavx2", "-mfma", "-mf16c"]),
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
LIBRARIES = {
    KERNELS: UNITS,
    BPE: [("words.cpp", []), ("bpe.cpp", ["-pthread"]), ("encode.cpp", ["-pthread"])],
}


def compiler() -> list[str] | None:
    """The C++ compiler's command: $CXX, or the first of c++, g++, clang++ that is there."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    return [found] if found else None


def _run(step: list[str]) -> str | None:
    """Why a step of the compilation could not be done, or None."""
    try:
        done = subprocess.run(step, capture_output=True, text=True)
    except OSError as error:
        return f"{step[0]}: {error.strerror}"
    return f"{shlex.join(step)}\n{done.stderr.strip()}" if done.returncode else None


def compile_library(target: Path, units: list[tuple[str, list[str]]]) -> str | None:
    """Compile sources of csrc/ to ``target``; returns why it could not be done, or None."""
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
        # Beside the old file and by a rename: a process that has it mapped keeps the old one.
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copyfile(library, temporary)
        temporary.replace(target)
    return None


def compile_all() -> str | None:
    """Compile every library into the checkout; returns what went wrong, or None."""
    problems = (compile_library(ROOT / library, units) for library, units in LIBRARIES.items())
    return next((problem for problem in problems if problem is not None), None)


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand in an environment without hatchling
    BuildHookInterface = object  # type: ignore[assignment,misc]


class KernelBuildHook(BuildHookInterface):  # type: ignore[misc]
    """Hatchling calls ``initialize`` for wheels and for editable installs."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        problem = compile_all()
        if problem is not None:
            if version == "editable":
                for library in LIBRARIES:  # ones of an earlier version would not fit
                    (ROOT / library).unlink(missing_ok=True)
            self.app.display_warning(f"xverse: installed without its fast CPU kernels: {problem}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["artifacts"] += LIBRARIES


if __name__ == "__main__":
    sys.exit(compile_all())
