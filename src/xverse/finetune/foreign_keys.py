"""Keys that are not settings: LLaMA-Factory's and transformers', accepted where they cannot change the
result and otherwise refused, all at once, each with what to use instead; and those of earlier recipes.

``foreign_keys.toml`` lists them.
"""

from __future__ import annotations

import importlib.resources
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xverse.config import UserError


@dataclass(frozen=True)
class Refusal:
    """``keys`` request something that is not supported, unless their value is None, false or ``harmless``.

    ``options`` belong to the keys: refused with them, and without effect otherwise. ``inverted``: false
    requests it.
    """

    keys: str
    advice: str
    harmless: Sequence[Any] = ()
    options: str = ""
    inverted: bool = False


_TABLES = tomllib.loads((importlib.resources.files(__package__) / "foreign_keys.toml").read_text("utf-8"))
WITHOUT_EFFECT = {key: reason for reason, keys in _TABLES["without_effect"].items() for key in keys.split()}
REFUSALS = [
    Refusal(keys, **(refusal if isinstance(refusal, dict) else {"advice": refusal}))
    for keys, refusal in _TABLES["refused"].items()
]
# Values of settings that LLaMA-Factory has and this project does not, and why.
VALUES = {tuple(setting.split()): advice for setting, advice in _TABLES["values"].items()}
ALIASES: dict[str, str] = _TABLES["aliases"]  # other names of settings
FORMER_KEYS: dict[str, str] = _TABLES["former"]


def foreign_keys() -> list[str]:
    """All keys that are known without being settings, for the command line."""
    refused = [key for item in REFUSALS for key in (*item.keys.split(), *item.options.split())]
    return [*WITHOUT_EFFECT, *refused]


def take_foreign(values: dict[str, Any], known: Iterable[str]) -> tuple[list[str], list[str]]:
    """Remove the keys of this module from ``values``, except ``known`` ones.

    Returns what is accepted without effect, with reasons, and what is not supported, each with what to use.
    """
    known = set(known)
    taken: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for key in [key for key in values if key in WITHOUT_EFFECT and key not in known]:
        taken.setdefault(WITHOUT_EFFECT[key], []).append(key)
        del values[key]
    for item in REFUSALS:
        keys, options = (
            [key for key in names.split() if key in values and key not in known]
            for names in (item.keys, item.options)
        )
        active = [key for key in keys if _requests(values[key], item)]
        if active:
            refused.setdefault(item.advice, []).extend([*active, *options])
        elif keys or options:
            taken.setdefault("nothing is requested", []).extend([*keys, *options])
        for key in (*keys, *options):
            del values[key]
    for (key, value), advice in VALUES.items():
        if values.get(key) == value:
            refused.setdefault(advice, []).append(f"{key} {value}")
    return _listed(taken), _listed(refused)


def _listed(keys_by_reason: Mapping[str, list[str]]) -> list[str]:
    return [f"{', '.join(keys)} ({reason})" for reason, keys in keys_by_reason.items()]


def _requests(value: Any, item: Refusal) -> bool:
    if str(value).lower() in ("", "none", "null"):
        return False
    if str(value).lower() in ("true", "false") and not item.harmless:
        return str(value).lower() == "true"
    if item.inverted:
        return str(value).lower() == "false"
    return not any(str(value).lower() == str(harmless).lower() for harmless in (*item.harmless, False))


def refuse_former_recipe(values: Mapping[str, Any], where: str) -> None:
    """Raise UserError for the keys of recipes before all recipes had these settings."""
    train = values.get("train")
    keys = [key for key in values if key in FORMER_KEYS]
    keys += [f"train.{key}" for key in train] if isinstance(train, Mapping) else []
    if keys:
        changes = ", ".join(f"{key} → {FORMER_KEYS.get(key, 'remove it')}" for key in keys)
        more = "" if "do_train" in values else "; add do_train: true and finetuning_type: full"
        raise UserError(
            f"{where}: the keys of fine-tuning recipes have changed: {changes}{more} "
            "(recipes/nano/sft.yaml is an example)"
        )
