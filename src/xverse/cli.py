"""The command line: ``xverse VERB``. Only the module of the chosen verb is imported, so that help is fast.

``VERBS`` gives each verb's help line. Each module in ``xverse.commands`` has ``arguments(parser)`` and
``run(args) -> exit code``, and imports heavy modules inside ``run``.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from xverse import __version__
from xverse.config import UserError, nearest, refuse_url
from xverse.values import short

VERBS = {
    "chat": "talk to a model in the terminal, or answer once with --ask",
    "serve": "serve a model over HTTP with OpenAI's, Anthropic's and Ollama's APIs",
    "batch": "answer a file of requests; after a crash, continue where it ended",
    "quantize": "quantise a model to 8, 4, 3 or 2 bits",
    "export": "write a model as a Hugging Face or Llama directory or GGUF file; merge adapters",
    "tokenizer": "train, repair or report on a tokenizer",
    "data": "prepare token shards from text, or show the data of a recipe",
    "plan": "find the best GPU layout for a pretraining run and predict its cost",
    "pretrain": "train a model from a recipe",
    "finetune": "fine-tune a model on dialogues, preferences, rewards or text",
    "eval": "score a model on MMLU, C-Eval, AGIEval, GAOKAO and more; report and compare",
    "bench": "measure speed, memory and the cost of quantisation on this machine",
    "doctor": "report the device, libraries, measured bandwidth and FLOPS",
    "completion": "print a shell completion script",
}


# Metavars of flags whose values may be URLs: text, models, outputs, and settings, which ``config.build``
# checks.
FREE = ("TEXT", "KEY=VALUE", "key=value", "M", "OUT", "RECIPE|FOLDER", "X", "NAME,…")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends a flag's default to its help, unless there is none or the text names it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        empty = action.default is None or action.default is False or action.default in ((), [])
        if empty or action.required or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors; an unknown flag or action gets the nearest one, and ``hint``."""

    hint = ""

    def __init__(self, *args: object, **options: object) -> None:
        options.setdefault("allow_abbrev", False)
        super().__init__(*args, **options)  # type: ignore[arg-type]

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        # Before argparse, which reports a misspelt required flag as missing; an unknown action comes first.
        names = self.below()
        unknown_action = names and args and not args[0].startswith("-") and args[0] not in names
        for argument in () if unknown_action else args or ():
            flag = argument.split("=")[0]
            if flag == "--":
                break
            if flag.startswith("--") and " " not in flag and flag not in self.known_flags():
                self.error(f"unknown argument '{flag}'{nearest(flag, self.known_flags())}")
        return super().parse_known_args(args, namespace)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """What no flag of any verb takes: an empty text, an infinite number, one beyond 64 bits; and a URL,
        except where it is text or is resolved later."""
        if isinstance(action, argparse._SubParsersAction):  # all words after it, which its parser checks
            return super()._get_value(action, arg_string)
        if not arg_string.strip():
            raise argparse.ArgumentError(action, "the value is empty")
        if action.type in (None, str, Path) and action.metavar not in FREE:
            try:
                refuse_url(arg_string, "the value")
            except UserError as error:
                raise argparse.ArgumentError(action, str(error)) from None
        value = super()._get_value(action, arg_string)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and not -(2**63) <= value < 2**63:
            raise argparse.ArgumentError(action, f"{short(arg_string)} is out of range")
        return value

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if choice:
            options = choice.group(2).replace("'", "").split(", ")
            message = f"unknown choice '{choice.group(1)}'{nearest(choice.group(1), options)} " + (
                f"(known: {', '.join(options)}{self.hint})"
            )
        message = re.sub(r"unrecognized arguments: (-\S*).*", r"unknown argument '\1'", message)
        message = message.replace("unrecognized arguments:", "too many arguments:")
        self.exit(2, f"{self.prog}: {one_line(message)}\n")

    def known_flags(self) -> list[str]:
        """The flags of this parser and of every action below it."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        for parser in self.below().values():
            flags += parser.known_flags()
        return flags

    def below(self) -> dict[str, Parser]:
        """The parsers of this parser's actions, such as train and repair below tokenizer."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return dict(action.choices)
        return {}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 2 user's mistake, 130 interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_standard_streams()
    return guarded("xverse", lambda: _dispatch(arguments))


def guarded(program: str, work: Callable[[], int]) -> int:
    """The exit code of ``work``; errors of the user and of the system are one line on stderr."""
    try:
        code = work()
        sys.stdout.flush()  # here, where BrokenPipeError is handled
        return code
    except UserError as error:
        print(f"{program}: {one_line(str(error))}", file=sys.stderr)
        return error.exit_code
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # PyTorch's, which may not be imported
            raise
        reason = ". ".join(" ".join(str(error).split()).split(". ")[:2])
        print(f"{program}: {reason}; use --quantize, smaller batches or --device cpu", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout exited, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"{program}: the file name is too long: {one_line(str(error.filename))}", file=sys.stderr)
        return 2


def one_line(message: str) -> str:
    """A message on one line, although it quotes what the user wrote: line ends and what else a terminal would
    obey become escapes, very long words are cut."""
    message = re.sub(r"(\S{200})\S{100,}", r"\1…", message)
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: repr(match[0])[1:-1], message)


def _open_standard_streams() -> None:
    """Open what the caller closed (``>&-``) on the null device: None has no ``write``, and the next file to
    be opened would get the number of stdin, stdout or stderr."""
    null = Path(os.devnull)
    sys.stdin = sys.stdin or null.open(encoding="utf-8")
    sys.stdout = sys.stdout or null.open("w", encoding="utf-8")
    sys.stderr = sys.stderr or null.open("w", encoding="utf-8")


def _dispatch(arguments: list[str]) -> int:
    width = max(map(len, VERBS))
    parser = Parser(
        prog="xverse",
        description="Run, serve, quantise, train, fine-tune and evaluate XVERSE-7B and related models.",
        usage="xverse VERB [options]   (xverse VERB --help for the options of a verb)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="verbs:\n" + "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items()),
    )
    parser.add_argument("--version", action="version", version=f"xverse {__version__}")
    if not arguments or arguments[0].startswith("-"):
        parser.parse_args(arguments)
        parser.print_help()
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        raise UserError(f"unknown verb '{verb}'{nearest(verb, VERBS)} (xverse --help lists the verbs)")
    parser = verb_parser(verb)
    # Flags may appear between a recipe and its key=value; argparse allows that only without actions.
    arguments_of_verb = parser.parse_args(rest) if parser.below() else parser.parse_intermixed_args(rest)
    return importlib.import_module(f"xverse.commands.{verb}").run(arguments_of_verb)


def verb_parser(verb: str) -> Parser:
    """The parser of one verb of ``VERBS``, with all its flags."""
    parser = Parser(
        prog=f"xverse {verb}",
        description=VERBS[verb][0].upper() + VERBS[verb][1:] + ".",
        formatter_class=HelpFormatter,
    )
    importlib.import_module(f"xverse.commands.{verb}").arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
