"""Strict configuration: YAML or JSON mappings to dataclasses, with unknown keys refused by name."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")


class UserError(Exception):
    """A mistake of the user's: one clear line that names what is wrong and how to mend it.

    The command line prints the line and exits with ``exit_code``; a server answers HTTP 4xx.
    """

    exit_code = 2


def nearest(name: str, options: Iterable[str]) -> str:
    """A hint such as ``; did you mean 'steps'?``, or an empty string where nothing is near."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def choose(kind: str, name: str, options: Mapping[str, T]) -> T:
    """``options[name]``; raises UserError that lists the options where there is no such name."""
    if name in options:
        return options[name]
    raise UserError(f"unknown {kind} '{name}'{nearest(name, options)} (known: {', '.join(options)})")


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Make the dataclass ``cls`` from a mapping, recursively.

    ``where`` names the source (a file, a flag) in errors. Raises UserError for a key that the dataclass
    does not have, for a missing required key and for a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: expected a mapping, found {type(values).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise UserError(f"{where}: unknown key '{key}'{nearest(str(key), fields)}")
    arguments = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in values.items()}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise UserError(f"{where}: missing key '{name}'")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        kinds = [option for option in options if option is not type(None)]
        fitting = [option for option in kinds if _is_mapping(option) == isinstance(value, Mapping)]
        return _convert((fitting or kinds)[0], value, where)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if origin is list:
        if not isinstance(value, list):
            raise UserError(f"{where}: expected a list, found {type(value).__name__}")
        return [_convert(typing.get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a list, found {type(value).__name__}")
        item_hint = typing.get_args(hint)[0]
        return tuple(_convert(item_hint, item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected a mapping, found {type(value).__name__}")
        item_hint = typing.get_args(hint)[1]
        return {str(key): _convert(item_hint, item, f"{where}.{key}") for key, item in value.items()}
    if origin is typing.Literal:
        allowed = typing.get_args(hint)
        if isinstance(value, bool) and ("on" if value else "off") in allowed:  # YAML 1.1 reads them as these
            return "on" if value else "off"
        if value not in allowed:
            raise UserError(f"{where}: '{value}' is not one of {', '.join(map(str, allowed))}")
        return value
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value).expanduser()
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 3e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return value
    raise UserError(f"{where}: expected {hint.__name__}, found {type(value).__name__} '{value}'")


def _is_mapping(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict


def load(cls: type[T], path: str | Path, overrides: Iterable[str] = ()) -> T:
    """Read a YAML file into ``cls``; ``overrides`` (see ``override``) replace its values."""
    return build(cls, override(read_yaml(path), overrides), str(path))


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
        raise UserError(f"'{text}': an override is written key=value")
    return key, yaml.safe_load(value)


def _inside(target: dict[str, Any] | list[Any], key: str, item: str) -> Any:
    """What stands in a section or list under ``key``; a section that is not there yet is made."""
    if isinstance(target, list):
        if not key.isdigit() or int(key) >= len(target):
            raise UserError(f"'{item}': '{key}' is not one of the list's items 0 to {len(target) - 1}")
        return target[int(key)]
    return target.setdefault(key, {})


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError for a missing, unreadable or ill-formed file."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys to values")
    return values
