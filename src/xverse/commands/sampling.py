"""Flags for the sampling parameters, derived from ``SamplingParams``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from xverse.config import UserError
from xverse.engine.sampling_params import CHAT, PARAMS, Param, SamplingParams
from xverse.values import short


def add_sampling_flags(parser: argparse.ArgumentParser, purpose: str) -> None:
    """A flag for each parameter; those that are not given are absent from the namespace."""
    group = parser.add_argument_group(
        "sampling",
        f"{purpose}. Parameters that are not given come from the model's generation_config.json, or else "
        "have the value in parentheses.",
    )
    text = "always take the most probable token: --temperature 0"
    group.add_argument("--greedy", action="store_true", default=argparse.SUPPRESS, help=text)
    for name, param in PARAMS.items():
        if param.api_only:
            continue
        default = getattr(CHAT, name)
        options: dict[str, Any] = {"action": "append"} if param.kind is str else {"type": _number(param)}
        group.add_argument(
            param.flag,
            default=argparse.SUPPRESS,
            metavar=param.metavar,
            help=param.help[0] + (f" ({default:g})" if default not in (None, ()) else ""),
            **options,
        )


def _number(param: Param) -> Callable[[str], Any]:
    """Parser of a value within the parameter's range."""

    def parse(text: str) -> Any:
        try:
            value = param.kind(text)
            param.check("", value)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from None
        except ValueError:
            kind = "whole number" if param.kind is int else "number"
            raise argparse.ArgumentTypeError(f"{short(text)} is not a {kind}") from None
        return value

    return parse


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The parameters that the command line sets. Raises UserError for a value out of range."""
    given = {name: getattr(args, name) for name in PARAMS if hasattr(args, name)}
    if hasattr(args, "greedy"):
        if "temperature" in given:
            raise UserError("--greedy and --temperature are mutually exclusive")
        given["temperature"] = 0.0
    SamplingParams(**given)
    return given
