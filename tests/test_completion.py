"""Completion scripts follow the parsers and work in the real shells that are installed."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from xverse.cli import VERBS, Parser, main, verb_parser


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def complete(program: str, words: list[str], cwd: Path) -> list[str]:
    """What bash would offer for the last of ``words``."""
    line = program + '\nCOMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _xverse; printf "%s\\n" "${COMPREPLY[@]}"'
    result = subprocess.run(["bash", "-c", line, "bash", *words], capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout.split()


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
def test_bash(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    program = script("bash", capsys)

    def offered(*words: str) -> list[str]:
        return complete(program, ["xverse", *words], tmp_path)

    assert offered("") == list(VERBS)
    assert offered("do") == ["doctor"]
    assert offered("--v") == ["--version"]
    assert offered("doctor", "--j") == ["--json"]
    assert offered("tokenizer", "re") == ["repair", "report"]
    assert offered("tokenizer", "train", "--vocab") == ["--vocab-size"]
    assert offered("completion", "") == ["bash", "zsh", "fish"]
    assert offered("export", "--format", "l") == ["llama"]
    assert offered("export", "--format", "=") == ["hf", "llama", "gguf"]  # --format=
    assert offered("export", "--format", "=", "l") == ["llama"]
    assert offered("export", "--model", "") == []  # bash falls back to file names
    assert offered("tokenizer", "train", "") == []
    for verb in VERBS:
        flags = offered(verb, "--")
        parser = verb_parser(verb)
        shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
        assert set(flags) == {flag for action in shown for flag in action.option_strings} - {"-h"}


def shown_flags(parser: Parser) -> list[str]:
    """The flags of a parser and its actions, without former ones that only give a message."""
    actions = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    below = [flag for sub in parser.below().values() for flag in shown_flags(sub)]
    return [flag for action in actions for flag in action.option_strings] + below


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_name_every_verb_and_flag(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    program = script(shell, capsys)
    for verb in VERBS:
        assert verb in program
        for flag in shown_flags(verb_parser(verb)):
            assert (f"-l {flag[2:]}" if shell == "fish" and flag.startswith("--") else flag[1:]) in program
    if shutil.which(shell):
        check = subprocess.run([shell, "-n"], input=program, capture_output=True, text=True)
        assert check.returncode == 0, check.stderr


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh here")
def test_zsh_registers_when_sourced(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "script").write_text(script("zsh", capsys))
    line = "autoload -Uz compinit; compinit -u -D; source ./script; echo $_comps[xverse]"
    check = subprocess.run(["zsh", "-f", "-c", line], capture_output=True, text=True, cwd=tmp_path)
    assert (check.stdout, check.stderr) == ("_shtab_xverse\n", "")


@pytest.mark.skipif(not shutil.which("fish"), reason="no fish here")
def test_fish_offers_choices(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "script").write_text(script("fish", capsys))
    line = 'source ./script; complete -C "xverse export --format "'
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    check = subprocess.run(
        ["fish", "-c", line], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert [row.split("\t")[0] for row in check.stdout.splitlines()] == ["hf", "llama", "gguf"]


def test_unknown_shell(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["completion", "bahs"])
    assert stopped.value.code == 2
    assert "did you mean 'bash'?" in capsys.readouterr().err
