"""Repair of tokenizer.json files that current ``tokenizers`` releases refuse.

Upstream's files have ``"add_prefix_space": false`` in their Metaspace parts. Since tokenizers 0.19 this
contradicts the default ``prepend_scheme`` ("always"), and the whole file is refused. The repair adds
``"prepend_scheme": "never"``, which is what the old field meant.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from xverse.config import UserError
from xverse.files import atomic_directory, write_json
from xverse.texts import read_object

_NESTED = ("pretokenizers", "decoders")  # the keys under which the two Sequence types hold their parts


def repair_json(values: dict[str, Any]) -> dict[str, Any]:
    """A copy of a tokenizer.json's mapping with repaired Metaspace parts in pre_tokenizer and decoder.

    The old field stays, so that old and new libraries both read the result.
    """
    result = copy.copy(values)
    for part in ("pre_tokenizer", "decoder"):
        if isinstance(values.get(part), dict):
            result[part] = _repair_part(values[part])
    return result


def needs_repair(values: dict[str, Any]) -> bool:
    """Whether ``repair_json`` would change anything."""
    return any(
        repair_json(values)[part] != values[part] for part in ("pre_tokenizer", "decoder") if part in values
    )


def _repair_part(part: dict[str, Any]) -> dict[str, Any]:
    part = dict(part)
    if part.get("type") == "Metaspace" and part.get("add_prefix_space") is False:
        part["prepend_scheme"] = "never"
    for key in _NESTED:
        if isinstance(part.get(key), list):
            part[key] = [_repair_part(item) if isinstance(item, dict) else item for item in part[key]]
    return part


def read_tokenizer_json(path: str | Path) -> dict[str, Any]:
    """The mapping in a tokenizer.json. Raises UserError if the file is missing or holds anything else."""
    values = read_object(path)
    if not isinstance(values.get("model"), dict):
        raise UserError(f"{path}: not a tokenizer.json (it has no model)")
    return values


def repair_file(source: str | Path, target: str | Path) -> bool:
    """Repair a tokenizer.json, or the one in a directory (other files are copied unchanged).

    Writes atomically; source and target may be the same. Returns whether anything needed repair.
    """
    source, target = Path(source), Path(target)
    if source.is_dir():
        values = read_tokenizer_json(source / "tokenizer.json")
        if source.resolve() == target.resolve():
            target = target / "tokenizer.json"
        else:
            if target.exists() and not target.is_dir():
                raise UserError(f"{target}: is a file, but {source} is a directory")
            if target.is_dir() and any(target.iterdir()):
                raise UserError(f"{target}: already exists and is not empty; name a new directory")
            with atomic_directory(target) as temporary:
                shutil.copytree(source, temporary, dirs_exist_ok=True)
                write_json(temporary / "tokenizer.json", repair_json(values))
            return needs_repair(values)
    else:
        values = read_tokenizer_json(source)
        if target.is_dir():
            target = target / "tokenizer.json"
    write_json(target, repair_json(values))
    return needs_repair(values)
