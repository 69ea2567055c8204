"""What a wheel is built for: platform tag and processor, of this machine or of a cross compilation."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.tags import mac_platforms, parse_tag

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "machine", "deployment", "tag", "processor"),
    [
        ("linux-x86_64", "x86_64", "", "linux_x86_64", "x86_64"),
        ("linux-amd64", "x86_64", "", "linux_x86_64", "x86_64"),
        ("linux-aarch64", "x86_64", "", "linux_aarch64", "aarch64"),  # cross compilation
        ("linux-x86_64", "aarch64", "", "linux_x86_64", "x86_64"),
        ("linux-arm64", "x86_64", "", "linux_aarch64", "aarch64"),
        ("linux-riscv64", "riscv64", "", "linux_riscv64", "riscv64"),
        ("linux-ppc64le", "ppc64le", "", "linux_ppc64le", "ppc64le"),
        ("linux-armv7l", "aarch64", "", "linux_armv7l", "armv7l"),
        ("manylinux_2_28-aarch64", "x86_64", "", "manylinux_2_28_aarch64", "aarch64"),
        ("manylinux_2_28_x86_64", "x86_64", "", "manylinux_2_28_x86_64", "x86_64"),
        ("manylinux2014-x86_64", "aarch64", "", "manylinux2014_x86_64", "x86_64"),
        ("musllinux_1_2-aarch64", "x86_64", "", "musllinux_1_2_aarch64", "aarch64"),
        ("macosx-11.0-arm64", "arm64", "11.0", "macosx_11_0_arm64", "arm64"),
        ("macosx-14-arm64", "arm64", "", "macosx_14_0_arm64", "arm64"),  # Homebrew
        ("macosx-14.5-arm64", "arm64", "", "macosx_14_0_arm64", "arm64"),
        ("macosx-11.0-aarch64", "x86_64", "", "macosx_11_0_arm64", "arm64"),
        ("macosx-10.9-universal2", "arm64", "", "macosx_11_0_arm64", "arm64"),  # python.org
        ("macosx-10.9-universal2", "arm64", "13.3", "macosx_13_0_arm64", "arm64"),
        ("macosx-10.13-universal2", "x86_64", "", "macosx_10_13_x86_64", "x86_64"),
        ("macosx-10.13-universal2", "x86_64", "10.15", "macosx_10_15_x86_64", "x86_64"),
        ("macosx-15-x86_64", "arm64", "12", "macosx_15_0_x86_64", "x86_64"),
        ("freebsd-14.1-release-amd64", "amd64", "", "freebsd_14_1_release_amd64", "amd64"),
        ("win-amd64", "AMD64", "", "win_amd64", "amd64"),
        ("win32", "AMD64", "", "win32", "amd64"),
    ],
)
def test_platforms(
    build: ModuleType, name: str, machine: str, deployment: str, tag: str, processor: str
) -> None:
    assert build.target(name, machine, deployment) == (tag, processor)
    [parsed] = parse_tag(f"py3-none-{tag}")
    assert parsed.platform == tag
    if tag.startswith("macosx"):  # one that pip on the newest macOS takes
        assert tag in mac_platforms((26, 0), processor)


def units(platform: str) -> set[str]:
    """The sources that are compiled for the platform."""
    program = "import hatch_build as b; print(*(s for units in b.LIBRARIES.values() for s, _ in units))"
    environment = {**os.environ, "_PYTHON_HOST_PLATFORM": platform}
    command = [sys.executable, "-c", program]
    return set(subprocess.check_output(command, cwd=ROOT, env=environment, text=True).split())


def test_each_processor_gets_all_its_instruction_sets() -> None:
    """Every source of csrc/ is in the wheel of a processor, whatever this one has."""
    x86, arm = units("linux-x86_64"), units("macosx-11.0-arm64")
    assert arm == units("linux-aarch64")
    assert x86 | arm == {path.name for path in (ROOT / "csrc").glob("*.cpp")}
    assert arm - x86 == {"neon.cpp"}
    assert units("linux-riscv64") == x86 & arm


def test_a_compiler_for_another_processor_is_named(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if build.compiler() is None:
        pytest.skip("needs a compiler")
    other = "aarch64" if build.MACHINE == "x86_64" else "x86_64"
    monkeypatch.setattr(build, "MACHINE", other)
    problem = build.compile_library(tmp_path / "library.so", [("portable.cpp", [])])
    assert problem is not None
    assert problem.endswith(f": set CXX to a compiler for {other}")
    assert not list(tmp_path.iterdir())


def test_libraries_are_compiled_again_only_after_a_change(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "ROOT", tmp_path)
    source = tmp_path / "csrc" / "api.cpp"
    source.parent.mkdir()
    source.touch()
    assert not build.compiled()
    later = build.Path(build.__file__).stat().st_mtime + 10
    for library in build.LIBRARIES:
        assert not build.compiled()
        (tmp_path / library).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / library).touch()
        os.utime(tmp_path / library, (later, later))
    os.utime(source, (later - 1, later - 1))
    assert build.compiled()
    os.utime(source, (later + 1, later + 1))
    assert not build.compiled()


def test_the_workflow_builds_what_the_readme_promises() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())
    runners = {
        entry["runner"]: entry["archs"]
        for entry in workflow["jobs"]["wheels"]["strategy"]["matrix"]["include"]
    }
    assert runners == {"ubuntu-latest": "x86_64", "ubuntu-24.04-arm": "aarch64", "macos-latest": "arm64"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    settings = project["tool"]["cibuildwheel"]
    # One wheel serves every Python; the oldest one builds it, and its test needs the compiled kernels.
    assert settings["build"] == "cp311-manylinux_* cp311-macosx_*"
    assert project["project"]["requires-python"] == ">=3.11"
    assert any("kernel_name" in command for command in settings["test-command"])
