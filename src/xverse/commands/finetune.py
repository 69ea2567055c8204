"""``xverse finetune``: a recipe, flags with LLaMA-Factory's and transformers' names, or both."""

from __future__ import annotations

import argparse
import dataclasses
import os
import typing
from pathlib import Path
from typing import Any

from xverse.config import UserError, key_value, override, read_yaml
from xverse.finetune.foreign_keys import ALIASES, foreign_keys
from xverse.finetune.settings import DERIVED, Settings, read_settings
from xverse.launcher import end_with_launcher
from xverse.values import flags


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.HelpFormatter  # it would print "(default: None)" for every flag
    add = flags(parser)
    text = "settings as YAML, with the names of the flags below (recipes/sft/full.yaml is an example)"
    add("recipe", text, nargs="?", metavar="RECIPE.yaml")
    text = "change a setting of the recipe, such as max_steps=100 or dataset.0.repeat=4"
    add("overrides", text, nargs="*", metavar="key=value")
    hints = typing.get_type_hints(Settings, include_extras=True)
    for field in dataclasses.fields(Settings):
        others = [alias for alias, name in ALIASES.items() if name == field.name]
        hint, text = typing.get_args(hints[field.name])
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            text += " (required)"
        elif isinstance(field.default, (int, float, str, Path)) and field.default not in (False, ""):
            text += f" (default: {field.default})"
        if others:
            text += f"; also --{', --'.join(others)}"
        options = {**_options(hint), "default": argparse.SUPPRESS}
        if hint is Path and field.name in Settings.URLS:
            options["metavar"] = "OUT"
        names = [f"--{field.name}"]
        if field.name == "local_rank":
            names.append("--local-rank")  # the spelling of torch.distributed.launch
        parser.add_argument(*names, **options, help=text.replace("%", "%%"))
        for alias in others:
            parser.add_argument(f"--{alias}", **options, help=f"another name of --{field.name}")
    hidden: dict[str, Any] = {"nargs": "?", "const": True, "default": argparse.SUPPRESS}
    for name in (*DERIVED, *foreign_keys()):
        add(f"--{name}", argparse.SUPPRESS, type=lambda text: key_value(f"value={text}")[1], **hidden)


def _options(hint: Any) -> dict[str, Any]:
    """argparse's options for a value of the type ``hint``."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": list(kinds), "type": type(kinds[0])}
    if typing.get_origin(hint) is dict or dataclasses.is_dataclass(hint):
        return {"nargs": "+", "action": _Pairs, "metavar": "KEY=VALUE"}
    if typing.get_origin(hint) is tuple:
        return {"metavar": "NAME,…"}
    if kinds:
        return _options(kinds[0])
    if hint is bool:
        return {"nargs": "?", "const": True, "type": _truth, "metavar": "true|false"}
    return {"type": str if hint is Path else hint, "metavar": {str: "X", Path: "DIR"}.get(hint, "N")}


class _Pairs(argparse.Action):
    """Collects ``KEY=VALUE`` words in a mapping."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        pairs: dict[str, Any] = dict(getattr(namespace, self.dest, None) or {})
        for word in values:
            key, value = key_value(word)
            pairs[key] = word.partition("=")[2] if self.dest == "identity" else value
        setattr(namespace, self.dest, pairs)


def _truth(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")


def run(args: argparse.Namespace) -> int:
    flags = {name: value for name, value in vars(args).items() if name not in ("recipe", "overrides")}
    values: dict[str, Any] = {}
    if args.recipe is not None:
        recipe = read_yaml(args.recipe)
        if isinstance(recipe, dict) and recipe.get("allow_code"):
            raise UserError(
                f"{args.recipe}: a recipe cannot permit code; remove allow_code and give --allow_code on the "
                "command line"
            )
        values = override(recipe, args.overrides)
    values |= flags
    if not values:
        raise UserError("finetune: give a recipe or flags; xverse finetune --help lists them")
    settings = read_settings(values, args.recipe or "finetune", quiet=os.environ.get("RANK", "0") != "0")

    end_with_launcher()  # before torch is imported, which takes seconds
    from xverse.finetune.run import run_finetuning
    from xverse.place import Place

    target = run_finetuning(settings)
    if target is not None:
        print(Place.of(settings.output_dir))
    return 0
