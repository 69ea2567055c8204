"""Every flag of every verb with nonsense: one line and exit code 2, or acceptance, before anything heavy."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import pytest

from tests.scale import ALL
from xverse.cli import VERBS, Parser, main, verb_parser

NONSENSE = [
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e400",
    "9" * 40,
    "9" * 400,
    "9" * 5000,
    "",
    " ",
    "x\ny",
    "http://x.org:80",
]


class Started(Exception):
    """A verb took its flags and began to work."""


def leaves(parser: Parser, path: list[str]) -> Iterator[tuple[list[str], Parser]]:
    below = parser.below()
    for name, child in below.items():
        yield from leaves(child, [*path, name])
    if not below:
        yield path, parser


PARSERS = {verb: verb_parser(verb) for verb in VERBS}
VERB_PARSERS = [each for verb in VERBS for each in leaves(PARSERS[verb], [verb])]


def required(parser: Parser, leave_out: argparse.Action) -> Iterator[str]:
    """Arguments without which the parser complains about something else."""
    valid = {"--device": "a100", "--bits": "8", "--gpus": "8"}
    for action in parser._actions:
        if action is leave_out:
            continue
        if action.option_strings and action.required:
            flag = action.option_strings[0]
            yield from (flag, valid.get(flag, str(next(iter(action.choices or ["missing-folder"])))))
        elif not action.option_strings and action.nargs in (None, "+"):
            yield str(next(iter(action.choices or ["missing-file"])))


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes long raises Started instead."""

    def started(*args: Any, **options: Any) -> Any:
        raise Started

    for name in (
        *("xverse.formats.directory.ModelDirectory.named", "xverse.formats.resolve"),
        *("xverse.chat.session.load_session", "xverse.serve.start.load_service"),
        *("xverse.finetune.run.run_finetuning", "xverse.plan.search.search"),
        *(f"xverse.bench.{name}.run" for name in ("infer", "serve", "train", "quant")),
        *("xverse.commands.eval._fetch", "xverse.commands.doctor.run", "xverse.eval.run.evaluate"),
    ):
        monkeypatch.setattr(name, started, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")
    monkeypatch.setattr("xverse.cli.verb_parser", PARSERS.__getitem__)  # making finetune's takes 20 ms


@pytest.mark.parametrize(("path", "parser"), VERB_PARSERS, ids=[" ".join(path) for path, _ in VERB_PARSERS])
def test_nonsense(
    path: list[str],
    parser: Parser,
    light: None,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for action in parser._actions:
        if not action.option_strings or action.nargs == 0:
            continue
        flag = next(name for name in action.option_strings if name.startswith("--"))
        others = ["--port=0"] if path == ["serve"] and flag != "--port" else []
        if path == ["finetune"]:
            others = ["--model_name_or_path=nano", "--dataset=x", "--do_train", "--output_dir=out"]
            others = [other for other in others if not other.startswith(flag)]
        # finetune has a hundred flags; fewer values show enough, of those that take texts two.
        few = ["", "x\ny", "nan", "-1", "1e400"][: 5 if _numeric(action) else 2]
        for value in few if path == ["finetune"] and not (ALL and _numeric(action)) else NONSENSE:
            arguments = [*path, *others, *required(parser, action), f"{flag}={value}"]
            code: Any
            try:
                code = main(arguments)
            except SystemExit as error:
                code = error.code
            except Started:
                code = 0
            printed = capsys.readouterr().err
            assert code in (0, 2), (arguments, code, printed)
            if code == 2:
                lines = [line for line in printed.splitlines() if not line.startswith("serve: ")]
                assert len(lines) == 1, (arguments, printed)
                assert len(printed) < 700
                assert "Error" not in printed, (arguments, printed)
            # A number that was taken is a number; hidden flags have no effect.
            if code == 0 and action.type is not None and action.help != argparse.SUPPRESS:
                assert not (value in ("nan", "inf", "-inf", "1e400") and _numeric(action)), arguments


def _numeric(action: argparse.Action) -> bool:
    try:
        return isinstance(action.type("1"), int | float) and math.isfinite(action.type("1"))  # type: ignore
    except (argparse.ArgumentTypeError, TypeError, ValueError):
        return False
