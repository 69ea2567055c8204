"""``xverse completion bash|zsh|fish``: a completion script that shtab makes from the verbs' own parsers."""

from __future__ import annotations

import argparse

from xverse.cli import VERBS, Parser, verb_parser

SHELLS = {
    "bash": "source <(xverse completion bash)",
    "zsh": "source <(xverse completion zsh)",
    "fish": "xverse completion fish | source",
}
# Bash splits --flag=value into three words, which shtab's function does not expect.
_BASH = """
_xverse() {
  local i words=()
  for ((i = 0; i <= COMP_CWORD; i++)); do
    if [[ ${COMP_WORDS[i]} != "=" ]]; then words+=("${COMP_WORDS[i]}")
    elif ((i == COMP_CWORD)); then words+=(""); fi
  done
  COMP_WORDS=("${words[@]}") COMP_CWORD=$((${#words[@]} - 1))
  _shtab_xverse
}
complete -o bashdefault -o default -F _xverse xverse
"""
# shtab's script registers itself under `eval` only, not under `source`.
_ZSH = ("$zsh_eval_context[-1] == eval", "$zsh_eval_context[-1] != loadautofunc")


def arguments(parser: argparse.ArgumentParser) -> None:
    loads = "; ".join(SHELLS.values())
    parser.add_argument("shell", choices=list(SHELLS), help=f"the shell that loads the script: {loads}")


def run(args: argparse.Namespace) -> int:
    import shtab

    script = shtab.complete(whole_parser(), shell=args.shell).rstrip() + "\n"
    if args.shell == "bash":
        script += _BASH
    elif args.shell == "zsh":
        assert _ZSH[0] in script
        script = script.replace(*_ZSH)
    print(script, end="")
    return 0


def whole_parser() -> Parser:
    """One parser of the whole command line, whose values without choices are file names."""
    parser = Parser(prog="xverse")
    parser.add_argument("--version", action="version", version="", help="print the version")
    verbs = parser.add_subparsers(dest="verb")
    for verb, text in VERBS.items():
        _complete_files(verbs.add_parser(verb, help=text, parents=[verb_parser(verb)], add_help=False))
    return parser


def _complete_files(parser: Parser) -> None:
    import shtab

    for action in parser._actions:
        if action.nargs != 0 and not action.choices:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    for below in parser.below().values():
        _complete_files(below)
