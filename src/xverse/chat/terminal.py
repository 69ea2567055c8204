"""The terminal interface of a session: reading turns, slash commands, streaming output, Ctrl-C and Ctrl-D.

If stdin and stdout are terminals, there is a prompt. Otherwise each input line is a turn, and stdout receives
the replies only. Messages to the user go to stderr in both cases.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import TextIO

from xverse.chat.saved import load_conversation, save_conversation
from xverse.chat.session import Session
from xverse.config import UserError, key_value, nearest
from xverse.engine.sampling_params import PARAMS
from xverse.log import notice

COMMANDS = {
    "/reset": "/reset                 forget the conversation, keep the system prompt",
    "/system": "/system [TEXT]         set the system prompt, or remove it",
    "/save": "/save FILE             write the conversation to a file",
    "/load": "/load FILE             continue a saved conversation",
    "/params": "/params [NAME=VALUE …] show or change the sampling parameters",
    "/help": "/help                  show this list",
    "/exit": "/exit                  leave (also Ctrl-D)",
}
_KEYS = "Ctrl-C stops a reply, Alt-Enter starts a new line, // at the start of a line sends a slash."

# A terminal interprets control characters; a model must not be able to move the cursor or set a title.
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Terminal:
    """Runs a session on stdin and stdout until the input ends."""

    def __init__(self, session: Session, stdin: TextIO, stdout: TextIO) -> None:
        self.session = session
        self.stdout = stdout
        self.interactive = stdin.isatty() and stdout.isatty()
        self._read: Callable[[], str] = _prompter() if self.interactive else lambda: _read_line(stdin)

    def run(self) -> int:
        """Returns the exit code: 2 if a line from a pipe could not be processed, else 0."""
        if self.interactive:
            notice("Type a message. /help lists the commands; Ctrl-C stops a reply, Ctrl-D leaves.")
        code = 0
        while True:
            try:
                line = self._read()
            except EOFError:
                return code
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                notice("Ctrl-D or /exit leaves.")
                continue
            try:
                if line.strip() == "/exit":
                    return code
                self._turn(line)
            except UserError as error:
                notice(str(error))
                code = 0 if self.interactive else 2
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                notice("stopped; the reply so far is kept")

    def _turn(self, line: str) -> None:
        if not line.strip():
            return
        if line.startswith("//"):
            line = line[1:]
        elif line.startswith("/"):
            self._command(line)
            return
        show(self.session.reply(line), self.stdout)

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        session = self.session
        if name == "/help":
            notice("\n".join([*COMMANDS.values(), _KEYS]))
        elif name == "/reset":
            session.reset()
            notice("conversation cleared")
        elif name == "/system":
            session.system = rest
            notice("system prompt set" if rest else "system prompt removed")
        elif name == "/save":
            save_conversation(session.messages, _file(name, rest))
            notice(f"{len(session.messages)} messages saved to {rest}")
        elif name == "/load":
            session.messages = load_conversation(_file(name, rest))
            notice(f"{len(session.messages)} messages loaded from {rest}")
        elif name == "/params":
            self._params(rest)
        else:
            raise UserError(f"unknown command '{name}'{nearest(name, COMMANDS)} (/help lists the commands)")

    def _params(self, rest: str) -> None:
        values = dict(key_value(item) for item in rest.split())
        self.session.sampling = self.session.sampling.changed(values, "/params")
        shown = {name: getattr(self.session.sampling, name) for name in PARAMS if not PARAMS[name].api_only}
        notice("\n".join(f"{name} = {_shown(value)}" for name, value in shown.items()))


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(repr, value)) or "none"
    return "random" if value is None else str(value)


def show(pieces: Generator[str, None, None], stdout: TextIO) -> None:
    """Write a reply as it arrives, raw: wrapping and right-to-left order are up to the terminal."""
    filtered = stdout.isatty()
    begun = False
    try:
        with contextlib.closing(pieces):
            for piece in pieces:
                stdout.write(piece.translate(_CONTROL) if filtered else piece)
                stdout.flush()
                begun = True
        begun = True  # an empty reply is a line, too
    finally:
        if begun:
            stdout.write("\n")
            stdout.flush()


def _file(command: str, rest: str) -> str:
    if not rest:
        raise UserError(f"{command}: name a file")
    return rest


def _read_line(stdin: TextIO) -> str:
    line = stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def _prompter() -> Callable[[], str]:
    """Line editing with history and wide characters; pasted line breaks stay in the message."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    commands = WordCompleter(list(COMMANDS), sentence=True)
    session: PromptSession[str] = PromptSession(
        "> ", completer=commands, complete_while_typing=False, key_bindings=keys
    )
    return session.prompt
