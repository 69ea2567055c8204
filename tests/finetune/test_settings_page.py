"""docs/finetuning.md documents every setting as the dataclass does. Run this file to print the tables."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from xverse.finetune.foreign_keys import ALIASES
from xverse.finetune.settings import DatasetUse, Replay, Settings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "finetuning.md"


def table(cls: type[Any]) -> str:
    """The fields of a settings class as a Markdown table."""
    lines = ["| setting | values | default | meaning |", "|---|---|---|---|"]
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint, text = typing.get_args(hints[field.name])
        others = [alias for alias, name in ALIASES.items() if name == field.name]
        if others:
            text += f"; also `{'`, `'.join(others)}`"
        lines.append(f"| `{field.name}` | {values(hint)} | {default(field)} | {text} |")
    return "\n".join(lines) + "\n"


def values(hint: Any) -> str:
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{kind}`" for kind in kinds)
    if typing.get_origin(hint) is dict or dataclasses.is_dataclass(hint):
        return "key=value"
    if typing.get_origin(hint) is tuple:
        return "names"
    if kinds:
        return values(kinds[0])
    return {bool: "true, false", int: "integer", float: "number", str: "text", Path: "path"}[hint]


def default(field: Any) -> str:
    if field.default is dataclasses.MISSING:
        return "" if field.default_factory is not dataclasses.MISSING else "required"
    if field.default in (None, ()):
        return ""
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def test_the_page_documents_every_setting() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for cls in (Settings, DatasetUse, Replay):
        assert table(cls) in page, (
            f"replace the table of {cls.__name__} by the output of {Path(__file__).name}"
        )


if __name__ == "__main__":
    print(table(Settings), table(DatasetUse), table(Replay), sep="\n")
