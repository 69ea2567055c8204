"""Every flag of every verb is explained, and no help text prints a default that is none."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from xverse.cli import VERBS, Parser, verb_parser


def parsers(parser: Parser) -> Iterator[Parser]:
    """This parser and those of all its actions."""
    yield parser
    for below in parser.below().values():
        yield from parsers(below)


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_is_explained(verb: str) -> None:
    for parser in parsers(verb_parser(verb)):
        for action in parser._actions:
            if not isinstance(action, argparse._SubParsersAction):
                assert action.help, f"{parser.prog}: {action.option_strings or action.dest} has no help"
        text = " ".join(parser.format_help().split())
        for phrase in ("(default: None)", "(default: )", "(default: [])", "(default: False)", "==SUPPRESS=="):
            assert phrase not in text, f"{parser.prog} prints {phrase}"
