"""The headers of csrc/ against the ctypes bindings and the sources: the same functions, fields and types."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import pytest

from xverse.kernels import native as kernels
from xverse.tokenizer import encoder
from xverse.tokenizer import native as tokenizer

CSRC = Path(__file__).parents[2] / "csrc"
HEADERS = {"xv_": "xverse_kernels.h", "xvt_": "xverse_tokenizer.h"}
SCALARS = {
    "int": ctypes.c_int,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
}


def text(name: str) -> str:
    """A source without comments, preprocessor lines and line breaks."""
    source = re.sub(r"//.*|^#.*", "", (CSRC / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return " ".join(source.split())


def declared(prefix: str) -> dict[str, tuple[str, list[str]]]:
    """Result and argument types of each function in a header."""
    pattern = rf"([\w* ]+?)\b({prefix}\w+)\(([^)]*)\);"
    functions = {}
    for result, name, arguments in re.findall(pattern, text(HEADERS[prefix])):
        types = [re.sub(r"\w+$", "", argument).strip() for argument in arguments.split(",")]
        functions[name] = result.strip(), [] if arguments.strip() == "void" else types
    return functions


def fields(struct: str) -> list[tuple[str, str]]:
    """(name, type) of each field of a struct of xverse_kernels.h."""
    (body,) = re.findall(rf"struct {struct} {{(.*?)}};", text("xverse_kernels.h"))
    parsed = [re.fullmatch(r"(.*?)(\w+)", field.strip()) for field in body.split(";") if field.strip()]
    return [(match[2], match[1].strip()) for match in parsed if match]


def matches(c_type: str, binding: Any) -> bool:
    """Whether ctypes passes ``binding`` as ``c_type``."""
    plain = re.sub(r"\b(const|struct)\b", "", c_type).replace(" ", "")
    if plain == "void":
        return binding is None
    if plain in SCALARS:
        return bool(binding is SCALARS[plain])
    if plain == "XvtReport":
        (result, arguments) = re.findall(r"typedef (\w+) \(\*XvtReport\)\(([^)]*)\)", text(HEADERS["xvt_"]))[
            0
        ]
        types = [argument.split()[0] for argument in arguments.split(",")]
        return binding._restype_ is SCALARS[result] and [*binding._argtypes_] == [SCALARS[t] for t in types]
    if plain == "char**":
        return binding in (ctypes.c_void_p, ctypes.POINTER(ctypes.c_char_p))
    if plain == "char*":
        return binding is ctypes.c_char_p
    return plain.endswith("*") and (
        binding is ctypes.c_void_p or (plain == "uint8_t*" and binding is ctypes.c_char_p)
    )


BOUND = {
    "xv_": {name: (kernels.RESULTS.get(name), list(types)) for name, types in kernels.SIGNATURES.items()},
    "xvt_": {name: (result, list(types)) for name, (types, result) in tokenizer._SIGNATURES.items()},
}


@pytest.mark.parametrize("prefix", HEADERS)
def test_every_function_is_bound_with_its_types(prefix: str) -> None:
    functions, bound = declared(prefix), BOUND[prefix]
    assert functions
    assert functions.keys() == bound.keys()
    for name, (result, arguments) in functions.items():
        assert matches(result, bound[name][0]), f"{name}: {result}"
        assert len(arguments) == len(bound[name][1]), name
        for number, pair in enumerate(zip(arguments, bound[name][1], strict=True)):
            assert matches(*pair), f"{name}, argument {number}: {pair}"


def test_structs_have_the_same_fields() -> None:
    names = ("Lora", "Cache", "Weight", "Layer")
    structs = {f"Xv{name}": getattr(kernels, name) for name in names}
    assert re.findall(r"struct (\w+) {", text("xverse_kernels.h")) == list(structs)
    for name, structure in structs.items():
        for (field, c_type), (bound, binding) in zip(fields(name), structure._fields_, strict=True):
            assert field == bound, name
            nested = structs.get(c_type.removeprefix("struct "))
            assert binding is nested if nested else matches(c_type, binding), f"{name}.{field}: {c_type}"


def test_dtypes_have_the_codes_of_the_header() -> None:
    (body,) = re.findall(r"enum XvType {(.*?)}", text("xverse_kernels.h"))
    codes = {name.lower(): int(code) for name, code in re.findall(r"XV_(\w+) = (\d+)", body)}
    assert {str(dtype).removeprefix("torch."): code for dtype, code in kernels.CACHE_TYPES.items()} == codes
    assert kernels.TYPES.items() <= kernels.CACHE_TYPES.items()


def test_splits_have_the_codes_of_the_header() -> None:
    (body,) = re.findall(r"enum XvtSplit {(.*?)}", text("xverse_tokenizer.h"))
    assert re.findall(r"XVT_\w+ = (\d+)", body) == [str(encoder._JOINED), str(encoder._SPACES)]


def test_instruction_sets_are_those_of_the_table() -> None:
    (rows,) = re.findall(r"kInstructionSets\[\] = {(.*?)};", text("instruction_sets.cpp"))
    assert re.findall(r'{"(\w+)"', rows) == list(kernels.NAMES)


@pytest.mark.parametrize("prefix", HEADERS)
def test_functions_are_declared_in_the_header_alone(prefix: str) -> None:
    """Every other file only defines them, and those that do include the header."""
    defined = []
    for path in sorted(CSRC.iterdir()):
        if path.name == HEADERS[prefix]:
            continue
        source = text(path.name)
        names = re.findall(rf"\b({prefix}\w+)\([^()]*\) {{", source)
        defined += names
        assert not re.findall(rf"[\w*] +\*?{prefix}\w+\([^()]*\);", re.sub(r"\breturn\b", "=", source)), (
            path.name
        )
        if names:
            assert f'#include "{HEADERS[prefix]}"' in path.read_text(encoding="utf-8"), path.name
    assert sorted(defined) == sorted(declared(prefix))


def test_the_libraries_have_every_function() -> None:
    libraries = {"xv_": kernels.library(), "xvt_": tokenizer.library()}
    for prefix, library in libraries.items():
        if library is None:
            pytest.skip("the libraries were not compiled, or are turned off")
        for name in declared(prefix):
            assert getattr(library, name)
