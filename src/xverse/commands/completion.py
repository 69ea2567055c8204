"""``xverse completion bash|zsh|fish``: a completion script made from the verbs' own parsers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from shlex import quote

from xverse.cli import VERBS, Parser, verb_parser


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=list(SCRIPTS), help="load with: source <(xverse completion bash)")


def run(args: argparse.Namespace) -> int:
    print(SCRIPTS[args.shell](list(contexts())), end="")
    return 0


@dataclass
class Flag:
    """One option: every spelling, one line of help, whether a value follows and from which choices."""

    spellings: list[str]
    help: str
    takes_value: bool
    choices: list[str] = field(default_factory=list)


@dataclass
class Context:
    """What may follow after ``xverse`` and the words of ``path``; without words, file names."""

    path: tuple[str, ...]
    flags: list[Flag]
    words: dict[str, str]  # word: its help


def contexts() -> Iterator[Context]:
    """Every place where a completion can be asked for: the verb, then each verb and each of its actions."""
    flags = [Flag(["-h", "--help"], "show help", False), Flag(["--version"], "print the version", False)]
    yield Context((), flags, VERBS)
    for verb in VERBS:
        yield from _walk((verb,), verb_parser(verb))


def _walk(path: tuple[str, ...], parser: Parser) -> Iterator[Context]:
    flags: list[Flag] = []
    words: dict[str, str] = {}
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:
            continue
        choices = [str(choice) for choice in action.choices or ()]
        if isinstance(action, argparse._SubParsersAction):
            words |= {choice.dest: choice.help or "" for choice in action._choices_actions}
        elif action.option_strings:
            takes_value = action.nargs != 0
            flags.append(Flag(list(action.option_strings), action.help or "", takes_value, choices))
        else:
            words |= dict.fromkeys(choices, "")
    yield Context(path, flags, words)
    for name, below in parser.below().items():
        yield from _walk((*path, name), below)


def bash(found: list[Context]) -> str:
    """A function for ``complete -F``; file names come from ``-o default`` where it offers nothing."""
    lines = [
        "# xverse completion for bash 3.2 and newer: source <(xverse completion bash)",
        "_xverse() {",
        "  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} path= words= i",
        "  for ((i = 1; i < COMP_CWORD; i++)); do",
        '    case "$path ${COMP_WORDS[i]}" in',
        f"      {'|'.join(quote(' ' + ' '.join(c.path)) for c in found if c.path)})",
        '        path="$path ${COMP_WORDS[i]}" ;;',
        "    esac",
        "  done",
        "  COMPREPLY=()",
        "  # --flag=value reaches us as three words",
        '  if [[ $cur == "=" ]]; then cur=',
        '  elif [[ $prev == "=" ]]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi',
        '  case "$path $prev" in',
    ]
    for context in found:
        for flag in context.flags:
            if flag.takes_value:
                pattern = "|".join(quote(_joined(context, spelling)) for spelling in flag.spellings)
                lines.append(f"    {pattern}) words={quote(' '.join(flag.choices))}; prev=value ;;")
    lines += ["  esac", "  if [[ $prev != value ]]; then", '    case "$path:$cur" in']
    for context in found:
        place = "".join(f" {word}" for word in context.path)
        spellings = " ".join(spelling for flag in context.flags for spelling in flag.spellings)
        lines.append(f"      {quote(place + ':')}-*) words={quote(spellings)} ;;")
        lines.append(f"      {quote(place + ':')}*) words={quote(' '.join(context.words))} ;;")
    lines += [
        "    esac",
        "  fi",
        '  COMPREPLY=($(compgen -W "$words" -- "$cur"))',
        "}",
        "complete -o default -F _xverse xverse",
    ]
    return "\n".join(lines) + "\n"


def zsh(found: list[Context]) -> str:
    """A function for ``compdef``, usable as a file ``_xverse`` on fpath or sourced."""
    lines = [
        "#compdef xverse",
        "# xverse completion for zsh: source <(xverse completion zsh)",
        "_xverse() {",
        "  local place= word cur=$words[CURRENT] prev=$words[CURRENT-1]",
        "  local -a items",
        "  for word in ${words[2,CURRENT-1]}; do",
        '    case "$place $word" in',
        f"      ({'|'.join(quote(' ' + ' '.join(c.path)) for c in found if c.path)})",
        '        place="$place $word" ;;',
        "    esac",
        "  done",
        '  case "$place $prev" in',
    ]
    for context in found:
        for flag in context.flags:
            if flag.takes_value:
                pattern = "|".join(quote(_joined(context, spelling)) for spelling in flag.spellings)
                act = f"compadd -- {' '.join(map(quote, flag.choices))}" if flag.choices else "_files"
                lines.append(f"    ({pattern}) {act}; return ;;")
    lines += ["  esac", '  case "$place:$cur" in']
    for context in found:
        place = quote("".join(f" {word}" for word in context.path) + ":")
        flags = [_described(spelling, flag.help) for flag in context.flags for spelling in flag.spellings]
        lines.append(f"    ({place}-*) items=({' '.join(flags)}) ;;")
        words = [_described(word, text) for word, text in context.words.items()]
        lines.append(f"    ({place}*) items=({' '.join(words)}) ;;")
    lines += [
        "  esac",
        "  if (( $#items )); then _describe -V xverse items; else _files; fi",
        "}",
        'if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _xverse "$@"; else compdef _xverse xverse; fi',
    ]
    return "\n".join(lines) + "\n"


def fish(found: list[Context]) -> str:
    """``complete`` lines, one for each word and flag, conditional on the words before them."""
    lines = ["# xverse completion for fish: xverse completion fish | source"]
    for context in found:
        seen = [f"__fish_seen_subcommand_from {word}" for word in context.path]
        if context.words:
            seen.append(f"not __fish_seen_subcommand_from {' '.join(context.words)}")
        start = f"complete -c xverse -n {quote('; and '.join(seen) or 'true')}"
        for word, text in context.words.items():
            lines.append(f"{start} -f -a {quote(word)}{_fish_text(text)}")
        for flag in context.flags:
            names = [f"-l {s[2:]}" if s.startswith("--") else f"-s {s[1:]}" for s in flag.spellings]
            value = ""
            if flag.takes_value:
                value = f" -x -a {quote(' '.join(flag.choices))}" if flag.choices else " -r"
            lines.append(f"{start} {' '.join(names)}{value}{_fish_text(flag.help)}")
    return "\n".join(lines) + "\n"


def _joined(context: Context, word: str) -> str:
    return "".join(f" {part}" for part in (*context.path, word))


def _described(word: str, text: str) -> str:
    text = " ".join(text.replace("%%", "%").split())
    return quote(word.replace(":", "\\:") + (":" + text if text else ""))


def _fish_text(text: str) -> str:
    text = " ".join(text.replace("%%", "%").split()).replace("\\", "\\\\").replace("'", "\\'")
    return f" -d '{text}'" if text else ""


SCRIPTS = {"bash": bash, "zsh": zsh, "fish": fish}
