"""Strict configuration: YAML or JSON mappings become dataclasses, and unknown keys are errors."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
DISTRIBUTION = "xverse-lm"


class UserError(Exception):
    """An error that the user can fix, in one line that names the problem and the fix.

    The command line prints it and exits with ``exit_code``; the server answers HTTP 4xx.
    """

    exit_code = 2


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def is_url(text: object) -> bool:
    """Whether a text is a URL such as ``s3://bucket/name``, also after ``Path`` has made one slash of two."""
    return isinstance(text, (str, Path)) and _URL.match(str(text)) is not None


def refuse_url(value: object, where: str) -> None:
    """Raise UserError for a URL that is given where only a path works."""
    if is_url(value):
        raise UserError(
            f"{where}: '{value}' is a URL, and only a path of this machine works here; mount it, or copy it "
            "from or to there"
        )


def nearest(name: str, options: Iterable[str]) -> str:
    """A hint such as ``; did you mean 'steps'?``, or an empty string if no option is similar."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def choose(kind: str, name: str, options: Mapping[str, T]) -> T:
    """``options[name]``. Raises UserError that lists the options for an unknown name."""
    if name in options:
        return options[name]
    raise UserError(f"unknown {kind} '{name}'{nearest(name, options)} (known: {', '.join(options)})")


def need(module: str, extra: str, purpose: str, *, load: bool = True) -> Any:
    """Import and return an optional ``module``, which the extra ``extra`` of pyproject.toml installs.

    ``purpose`` begins the error message: the flag, file or command that needs the module. ``load=False`` only
    checks that it can be found and returns None. Raises UserError with the command that installs it.
    """
    root = module.partition(".")[0]
    try:
        if load:
            return importlib.import_module(module)
        if importlib.util.find_spec(module) is not None:
            return None
        missing = root
    except ModuleNotFoundError as error:
        missing = (error.name or root).partition(".")[0]
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{purpose} needs {root}, which cannot be imported ({reason})") from error
    raise UserError(f"{purpose} needs {missing}, which is not installed; run: {install_command(extra)}")


def installed_version(name: str) -> str | None:
    """The version of an installed distribution."""
    import importlib.metadata  # here, because it delays `xverse --help`

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def install_command(extra: str) -> str:
    """The command that installs an extra, from a package index or, in a checkout, from its folder."""
    checkout = (Path(__file__).resolve().parents[2] / "pyproject.toml").is_file()
    return f"pip install -e '.[{extra}]'" if checkout else f"pip install '{DISTRIBUTION}[{extra}]'"


def check_keys(keys: Iterable[Any], known: Iterable[str], where: str) -> None:
    """Raise one UserError that names all ``keys`` that are not ``known``, each with the nearest known one."""
    options = list(known)
    report_unknown([(str(key), nearest(str(key), options)) for key in keys if key not in options], where)


def report_unknown(unknown: Sequence[tuple[str, str]], where: str) -> None:
    """Raise UserError for pairs of an unknown key and its hint from ``nearest``, unless there are none."""
    if unknown:
        raise UserError(f"{where}: {unknown_text(unknown)}")


def unknown_text(unknown: Sequence[tuple[str, str]]) -> str:
    """The part of an error message that names unknown keys, given with their hints from ``nearest``."""
    if len(unknown) == 1:
        return f"unknown key '{unknown[0][0]}'{unknown[0][1]}"
    return "unknown keys " + ", ".join(
        f"'{key}'" + (f" ({hint[2:]})" if hint else "") for key, hint in unknown
    )


def unknown_keys(cls: type[Any], values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The keys of ``values``, at every depth, that the dataclass does not have; hints from ``nearest``."""
    return list(_unknown(cls, values, ""))


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Make the dataclass ``cls`` from a mapping, recursively.

    A URL is refused as the value of any key that the class does not list in ``URLS``.

    ``where`` names the source (a file, a flag) in errors. Raises UserError for unknown keys (all of them, at
    every depth), for missing required keys and for a value of the wrong type.
    """
    _mapping(values, where)
    report_unknown(unknown_keys(cls, values), where)
    return _build(cls, values, where)


@functools.cache
def _type_hints(cls: type[Any]) -> dict[str, Any]:
    """Evaluated once: the annotations are strings, and some classes have a hundred."""
    return typing.get_type_hints(cls)


def _build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    _mapping(values, where)
    hints = _type_hints(cls)  # type: ignore[arg-type]
    for key in values.keys() - set(getattr(cls, "URLS", ())):
        items = values[key] if isinstance(values[key], (list, tuple)) else [values[key]]
        for item in items:
            refuse_url(item, f"{where}: {key}")
    arguments = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in values.items()}
    required = [
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [f"'{name}'" for name in required if name not in arguments]
    if missing:
        raise UserError(f"{where}: missing key{'s' if len(missing) > 1 else ''} {', '.join(missing)}")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _unknown(hint: Any, value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Keys of ``value``, as dotted paths, that the dataclasses in ``hint`` do not have; each with a hint."""
    for kind in _alternatives(hint):
        origin = typing.get_origin(kind)
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
            names = {field.name for field in dataclasses.fields(kind)}
            every = _type_hints(kind)  # type: ignore[arg-type]
            hints = {name: hint for name, hint in every.items() if name in names}
            for key, item in value.items():
                if key in hints:
                    yield from _unknown(hints[key], item, f"{path}{key}.")
                else:
                    yield f"{path}{key}", nearest(str(key), hints)
            return
        if origin is dict and isinstance(value, Mapping):
            for key, item in value.items():
                yield from _unknown(typing.get_args(kind)[1], item, f"{path}{key}.")
        elif origin in (list, tuple) and isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                yield from _unknown(typing.get_args(kind)[0], item, f"{path}{i}.")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union; another type alone."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _mapping(value: Any, where: str) -> None:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected a mapping, found {type(value).__name__}")


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    options = _alternatives(hint)
    if len(options) > 1:
        if value is None and type(None) in options:
            return None
        kinds = [option for option in options if option is not type(None)]
        fitting = [option for option in kinds if _is_mapping(option) == isinstance(value, Mapping)]
        return _convert((fitting or kinds)[0], value, where)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a list, found {type(value).__name__}")
        item_hint = typing.get_args(hint)[0]
        return origin(_convert(item_hint, item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        _mapping(value, where)
        item_hint = typing.get_args(hint)[1]
        return {str(key): _convert(item_hint, item, f"{where}.{key}") for key, item in value.items()}
    if origin is typing.Literal:
        allowed = typing.get_args(hint)
        if isinstance(value, bool) and ("on" if value else "off") in allowed:  # YAML 1.1's booleans
            return "on" if value else "off"
        if value not in allowed:
            raise UserError(f"{where}: '{value}' is not one of {', '.join(map(str, allowed))}")
        return value
    if hint is Path and isinstance(value, (str, Path)) and value and "\0" not in str(value):
        return value if is_url(value) else Path(value).expanduser()  # a Path has one slash of two
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # a string, too: YAML 1.1 parses 3e-4 as one
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if hint is int and isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{where}: {str(value)[:40]}… is out of range")
    if hint is Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return value
    raise UserError(f"{where}: expected {hint.__name__}, found {type(value).__name__} '{value}'")


def _is_mapping(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict


def load(
    cls: type[T], path: str | Path, overrides: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> T:
    """Read a YAML file into ``cls``; ``overrides`` (see ``override``), then ``flags``, replace its values."""
    values = override(read_yaml(path), overrides)
    return build(cls, {**values, **(flags or {})}, str(path))


def override(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Set in ``values``, in place, what texts such as ``key=value``, ``section.key=value`` and
    ``list.0.key=value`` say; values are read as YAML. Raises UserError for one that cannot be applied.
    """
    for text in overrides:
        key, value = key_value(text)
        target: Any = values
        *sections, last = key.split(".")
        for section in sections:
            target = _inside(target, section, text)
            if not isinstance(target, (dict, list)):
                raise UserError(f"'{text}': '{section}' is not a section")
        _inside(target, last, text)
        target[int(last) if isinstance(target, list) else last] = value
    return values


def key_value(text: str) -> tuple[str, Any]:
    """The key of ``key=value`` and its value, read as YAML. Raises UserError for anything else."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UserError(f"'{text}': expected key=value")
    try:
        return key, _parse_yaml(value)
    except ValueError as error:
        raise UserError(f"'{text}': the value is not valid YAML ({error}); quote it if it is text") from None


def _inside(target: dict[str, Any] | list[Any], key: str, text: str) -> Any:
    """The value of ``key`` in a section or list; a section that does not exist is created."""
    if isinstance(target, list):
        if not key.isdigit() or int(key) >= len(target):
            raise UserError(f"'{text}': '{key}' is not one of the list's items 0 to {len(target) - 1}")
        return target[int(key)]
    return target.setdefault(key, {})


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, empty for an empty file. Raises UserError if it cannot be read."""
    try:
        values = _parse_yaml(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({os.strerror(error.errno or 0)})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: invalid UTF-8 at byte {error.start}; save it as UTF-8 text") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys to values")
    return values


def _parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises ValueError, in one line, for invalid YAML and for a repeated key."""
    import yaml  # here, because it takes a sixth of the time of `xverse --help`

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            names = set()
            for key, _ in node.value:
                name = key.tag, str(key.value)
                if name in names:
                    raise ValueError(f"line {key.start_mark.line + 1}: key '{key.value}' is given twice")
                names.add(name)
            return node

    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:  # such as a date in month 13
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
