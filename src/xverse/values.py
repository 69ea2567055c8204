"""Values of flags that several verbs check alike. A wrong value ends with one line and exit code 2."""

from __future__ import annotations

import argparse
import ipaddress
import re
from collections.abc import Callable
from typing import Any

from xverse.config import UserError

_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)", re.IGNORECASE)

# LLaMA-Factory's names of the chat formats in ``tokenizer/published.py``.
CHAT_FORMATS = ("alpaca", "baichuan2", "chatml", "intern", "llama2", "vicuna")
TEMPLATE_HELP = f"chat format of a model whose files have none: {', '.join(CHAT_FORMATS)}"
MODEL_HELP = "nano, a directory, a .gguf file, a run or checkpoint of training, a hub id or a URL"


def flags(parser: argparse._ActionsContainer) -> Callable[..., None]:
    """``add(name, help, **options)``, which adds a flag to a parser."""

    def add(name: str, text: str, **options: Any) -> None:
        if options.get("nargs") == "*" and not name.startswith("-"):
            options["default"] = []  # without a default, argparse lists it among those required
        parser.add_argument(name, help=text, **options)

    return add


def add_model(parser: argparse._ActionsContainer) -> None:
    """The flag ``--model``."""
    parser.add_argument("--model", default="nano", metavar="M", help=MODEL_HELP)


def add_actions(parser: argparse.ArgumentParser, **texts: str) -> list[Any]:
    """The parsers of a verb's actions, such as train below tokenizer, each described by its text."""
    below = parser.add_subparsers(dest="action", required=True, metavar="|".join(texts))
    form = parser.formatter_class
    return [
        below.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", formatter_class=form)
        for name, text in texts.items()
    ]


def whole(low: int = 0, high: int | None = None) -> Callable[[str], int]:
    """Parser of a whole number from ``low`` to ``high`` (None: no limit)."""
    span = f"at least {low}" if high is None else f"{low} to {high}"

    def parse(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,18}", text):
            raise argparse.ArgumentTypeError(f"{short(text)} is not a whole number ({span})")
        value = int(text)
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{value} is out of range ({span})")
        return value

    return parse


def positive(high: float) -> Callable[[str], float]:
    """Parser of a number above 0, at most ``high``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{short(text)} is not a number") from None
        if not 0 < value <= high:  # NaN fails too
            raise argparse.ArgumentTypeError(f"{short(text)} is out of range (above 0, at most {high:g})")
        return value

    return parse


def host_name(text: str) -> str:
    """A host name or an IP address, without scheme, port and path; in lower case."""
    name = text.strip().lower()
    try:
        return str(ipaddress.ip_address(name.removeprefix("[").removesuffix("]")))
    except ValueError:
        pass
    ascii_name = name
    if not name.isascii():
        try:
            ascii_name = name.encode("idna").decode()
        except UnicodeError:
            ascii_name = ""
    if len(ascii_name) <= 253 and all(map(_LABEL.fullmatch, ascii_name.removesuffix(".").split("."))):
        return ascii_name
    inner = re.fullmatch(r"(?:\w+://)?(\[[0-9a-f:.]+\]|[\w.-]+)(?::\d*)?(?:/.*)?", name)
    hint = f"; write {inner[1]}" if inner and inner[1] != name else ""
    raise argparse.ArgumentTypeError(f"{short(text)} is not a host name or an address{hint}")


def allowed_host(text: str) -> str:
    return text if text == "*" else host_name(text)


def network(text: str) -> str:
    """An IP address or a network such as 10.0.0.0/8."""
    try:
        ipaddress.ip_network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{short(text)} is not an IP address or a network such as 10.0.0.0/8 ({error})"
        ) from None
    return text


def sub_path(text: str) -> str:
    """A path such as /xv, without the slash at its end."""
    path = text.rstrip("/")
    if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", path) or any(
        part in (".", "..") for part in path.split("/")
    ):
        raise argparse.ArgumentTypeError(f"{short(text)} is not a path such as /xv")
    return path


def refuse_unused(args: argparse.Namespace, needed: str, **defaults: Any) -> None:
    """Raise UserError for a flag that only has an effect with ``needed`` and differs from its default."""
    for name, default in defaults.items():
        if getattr(args, name) != default:
            raise UserError(f"--{name.replace('_', '-')} has no effect without {needed}; omit it")


def short(text: str) -> str:
    """``text`` in quotes on one line, cut if it is long."""
    return repr(text if len(text) <= 40 else text[:40] + "…")
