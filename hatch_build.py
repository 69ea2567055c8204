"""Build hook: compile csrc/ to two shared libraries, for ``xverse.kernels`` and ``xverse.tokenizer``.

Without a compiler the package installs without them: it computes with PyTorch's operations (`xverse doctor`
reports which kernels are in use) and trains tokenizers with the ``tokenizers`` library. In a checkout,
``python hatch_build.py`` compiles them in place. ``_PYTHON_HOST_PLATFORM``, Python's own variable for cross
compilation, names another platform to build a wheel for, and ``CXX`` a compiler for it.
"""

from __future__ import annotations

import os
import platform
import re
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

_X86, _ARM = ("x86_64", "amd64"), ("aarch64", "arm64")


def _family(machine: str) -> tuple[str, ...] | None:
    return next((names for names in (_X86, _ARM) if machine in names), None)


def target(name: str, machine: str, deployment: str = "") -> tuple[str, str]:
    """The platform tag of a wheel, and the processor its libraries are compiled for.

    ``name``: the platform as ``sysconfig.get_platform`` gives it; ``machine``: this machine's processor, for
    which a Python for several (``universal2``) compiles; ``deployment``: the oldest macOS to support,
    if newer than Python's.
    """
    parts = re.fullmatch(r"(.+?)[-_](x86_64|[^-_]+)", name.lower())
    if parts is None:  # win32
        return name, machine.lower()
    system, processor = parts.groups()
    processor = machine.lower() if processor.startswith(("universal", "fat", "intel")) else processor
    mac = re.fullmatch(r"macosx[-_](\d+)(?:[._](\d+))?", system)
    if names := (mac or re.match(r"(many|musl)?linux", system)) and _family(processor):
        processor = names[1 if mac and names is _ARM else 0]  # pip knows each one by one name
    if mac:
        version = int(mac[1]), int(mac[2] or 0)
        if deployment:
            version = max(version, (*map(int, deployment.split(".")[:2]), 0)[:2])
        if processor == "arm64":
            version = max(version, (11, 0))  # the first one for this processor
        system = f"macosx_{version[0]}_{version[1] if version[0] < 11 else 0}"
    return re.sub("[-.]", "_", f"{system}_{processor}"), processor


TAG, MACHINE = target(
    sysconfig.get_platform(), platform.machine(), os.environ.get("MACOSX_DEPLOYMENT_TARGET", "")
)

# GCC 12's own intrinsics cause thousands of -Wmaybe-uninitialized warnings.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-psabi"]
# What the tag says, in the terms of Apple's compiler; it compiles for either processor.
_TARGET: list[str] = []
if _mac := re.match(r"macosx_(\d+)_(\d+)", TAG):
    _TARGET = ["-arch", MACHINE, f"-mmacosx-version-min={_mac[1]}.{_mac[2]}"]
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
    ("lora.cpp", []),
    ("attention_generic.cpp", []),
    ("rounding.cpp", [*_ROUNDING, "-DXV_ROUND=round_portable"]),
    ("training_api.cpp", []),
    ("training.cpp", ["-DXV_TRAINING=kTrainingPortable"]),
]
if _family(MACHINE) is _X86:
    UNITS += [
        ("avx2.cpp", ["-mavx2", "-mfma", "-mf16c"]),
        ("avx2.cpp", ["-mavx2", "-mfma", "-mf16c", "-mavxvnni"]),
        ("avx512.cpp", _AVX512),
        ("avx512.cpp", [*_AVX512, "-mavx512bf16"]),
        ("avx512.cpp", [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8"]),
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
elif _family(MACHINE) is _ARM:
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


def _foreign(command: list[str]) -> str | None:
    """Why the compiler's libraries would not run on the target, or None."""
    result = subprocess.run([*command, *_TARGET, "-dumpmachine"], capture_output=True, text=True)
    made_for = result.stdout.strip().partition("-")[0]
    if result.returncode or not made_for or _family(made_for) == _family(MACHINE):
        return None
    return f"{shlex.join(command)} compiles for {made_for}: set CXX to a compiler for {MACHINE}"


def compile_library(path: Path, units: list[tuple[str, list[str]]]) -> str | None:
    """Compile sources of csrc/ to the library ``path``; returns the error, or None."""
    command = compiler()
    if command is None:
        return "no C++ compiler (c++, g++ or clang++) was found"
    if shutil.which(command[0]) and (problem := _foreign(command)):
        return problem
    with tempfile.TemporaryDirectory() as folder:
        objects = [str(Path(folder) / f"{number}.o") for number in range(len(units))]
        steps = [
            [*command, *_TARGET, *FLAGS, *flags, "-c", str(ROOT / "csrc" / source), "-o", output]
            for (source, flags), output in zip(units, objects, strict=True)
        ]
        library = str(Path(folder) / "library.so")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            problem = next(filter(None, pool.map(_run, steps)), None)
        problem = problem or _run([*command, *_TARGET, "-shared", "-pthread", *objects, "-o", library])
        if problem is not None:
            return problem
        path.parent.mkdir(parents=True, exist_ok=True)
        # Replaced by a rename: a process that has the old file mapped keeps it.
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        shutil.copyfile(library, temporary)
        temporary.replace(path)
    return None


def compile_all(folder: Path = ROOT) -> str | None:
    """Compile every library, by default in the checkout; returns the first error, or None."""
    problems = (compile_library(folder / library, units) for library, units in LIBRARIES.items())
    return next((problem for problem in problems if problem is not None), None)


def compiled() -> bool:
    """Whether the checkout's libraries are newer than all that they are made of."""
    sources = [Path(__file__), *(ROOT / "csrc").iterdir()]
    libraries = [ROOT / library for library in LIBRARIES]
    if not all(library.is_file() for library in libraries):
        return False
    newest = max(source.stat().st_mtime_ns for source in sources)
    return all(library.stat().st_mtime_ns > newest for library in libraries)


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script, without hatchling
    BuildHookInterface = object  # type: ignore[assignment,misc]


class KernelBuildHook(BuildHookInterface):  # type: ignore[misc]
    """Hatchling calls ``initialize`` for wheels and editable installs."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        # A wheel may be for another platform: the checkout keeps its own libraries.
        self.folder = None if version == "editable" else tempfile.TemporaryDirectory()
        folder = Path(self.folder.name) if self.folder else ROOT
        # make compiles while pip downloads, and installs extras later; CXX may name another compiler.
        current = version == "editable" and "CXX" not in os.environ and compiled()
        problem = None if current else compile_all(folder)
        if problem is not None:
            if version == "editable":
                for library in LIBRARIES:  # those of an earlier version would not match
                    (ROOT / library).unlink(missing_ok=True)
            self.app.display_warning(f"xverse: installed without its fast CPU kernels: {problem}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{TAG}"
        if self.folder:
            for library in LIBRARIES:
                build_data["force_include"][str(folder / library)] = library.removeprefix("src/")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self.folder:
            self.folder.cleanup()


if __name__ == "__main__":
    sys.exit(compile_all())
