"""The terminal interface of a session: reading turns, slash commands, streaming output, Ctrl-C and Ctrl-D.

If stdin and stdout are terminals, there is a prompt with a history, and replies are coloured. Otherwise each
input line is a turn, and stdout receives the replies only. Messages to the user go to stderr in both cases.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TextIO

from xverse.chat.colour import Markdown, colours
from xverse.chat.prompt import prompter
from xverse.chat.saved import load_conversation, save_conversation
from xverse.chat.session import Session
from xverse.chat.translations import COMMANDS, help_text, translated
from xverse.config import UserError, key_value, nearest
from xverse.engine.sampling_params import PARAMS
from xverse.log import notice
from xverse.texts import read_text

_MOST_BYTES = 4 * 1024**2  # of a file in a message: several times the context of any model

# A terminal interprets control characters; a model must not be able to move the cursor or set a title.
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Terminal:
    """Runs a session on stdin and stdout until the input ends."""

    def __init__(
        self, session: Session, stdin: TextIO, stdout: TextIO, name: str = "", history: bool = True
    ) -> None:
        self.session = session
        self.stdout = stdout
        self.interactive = stdin.isatty() and stdout.isatty()
        self._name = name
        self._attached: list[str] = []
        self._read: Callable[[], str] = prompter(history) if self.interactive else lambda: _read_line(stdin)

    def run(self) -> int:
        """Returns the exit code: 2 if a line from a pipe could not be processed, else 0."""
        if self.interactive:
            config = self.session.engine.model.config
            size = f"{config.num_parameters() / 1e6:,.1f} M"
            notice(translated("model", name=self._name, parameters=size, context=config.context_length))
            notice(translated("welcome"))
        code = 0
        while True:
            try:
                line = self._read()
            except EOFError:
                return code
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                notice(translated("leave"))
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
                notice(translated("stopped"))

    def _turn(self, line: str) -> None:
        if not line.strip():
            return
        if line.startswith("//"):
            line = line[1:]
        elif line.startswith("/"):
            self._command(line)
            return
        text = "\n\n".join([*self._attached, line])
        self._show(self.session.reply(text))
        self._attached.clear()

    def _show(self, pieces: Generator[str, None, None]) -> None:
        show(self.session, pieces, self.stdout)
        speed = self.session.speed
        if self.interactive:
            notice(translated("speed", count=speed.tokens, first=speed.first, rate=speed.rate))

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        session = self.session
        if name not in COMMANDS:
            raise UserError(f"unknown command '{name}'{nearest(name, COMMANDS)} (/help lists the commands)")
        if rest and name in ("/help", "/reset", "/retry", "/undo", "/exit"):
            raise UserError(f"{name} takes no argument")
        if name == "/help":
            notice(help_text())
        elif name == "/file":
            self._attach(_file(name, rest))
        elif name == "/retry":
            if session.sampling.seed is not None or not session.sampling.temperature:
                notice(translated("same"))
            self._show(session.retry())
        elif name == "/undo":
            notice(translated("undone", text=_shortened(session.undo()["content"])))
        elif name == "/reset":
            session.reset()
            self._attached.clear()
            notice(translated("cleared"))
        elif name == "/system":
            session.system = rest
            notice(translated("system set" if rest else "system removed"))
        elif name == "/save":
            save_conversation(session.messages, _file(name, rest))
            notice(translated("saved", count=len(session.messages), file=rest))
        elif name == "/load":
            session.messages = load_conversation(_file(name, rest))
            notice(translated("loaded", count=len(session.messages), file=rest))
        elif name == "/adapter":
            self._adapter(rest)
        else:
            self._params(rest)

    def _adapter(self, name: str) -> None:
        session = self.session
        if name and name != "none" and name not in session.adapters:
            hint = nearest(name, session.adapters) or f"; there are: {', '.join(session.adapters) or 'none'}"
            raise UserError(f"/adapter: no adapter is called '{name}'{hint}")
        if name:
            session.adapter = None if name == "none" else name
        names = ", ".join(session.adapters) or "none"
        notice(translated("adapters", names=names, used=session.adapter or "none"))

    def _attach(self, file: str) -> None:
        path = Path(file).expanduser()
        if path.exists() and not path.is_file():
            raise UserError(f"{file}: is not a file")
        if path.exists() and path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{file}: is too long for a message")
        text = read_text(path).rstrip("\n")
        try:
            count = self.session.room("\n\n".join([*self._attached, text]))
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        self._attached.append(text)
        notice(translated("attached", file=file, count=count))

    def _params(self, rest: str) -> None:
        values = dict(key_value(item) for item in rest.split())
        self.session.sampling = self.session.sampling.changed(values, "/params")
        shown = {name: getattr(self.session.sampling, name) for name in PARAMS if not PARAMS[name].api_only}
        notice("\n".join(f"{name} = {_shown(value)}" for name, value in shown.items()))


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(repr, value)) or "none"
    return "random" if value is None else str(value)


def show(session: Session, pieces: Generator[str, None, None], stdout: TextIO) -> None:
    """Write a reply as it arrives: wrapping and right-to-left order are up to the terminal."""
    filtered, markdown = stdout.isatty(), Markdown() if colours(stdout) else None
    begun = False
    try:
        with contextlib.closing(pieces):
            for piece in pieces:
                text = piece.translate(_CONTROL) if filtered else piece
                stdout.write(markdown.push(text) if markdown else text)
                stdout.flush()
                begun = True
        begun = True  # an empty reply is a line, too
    finally:
        if begun:
            stdout.write((markdown.finish() if markdown else "") + "\n")
            stdout.flush()
    if session.ending:
        session.notify(session.ending)


def _file(command: str, rest: str) -> str:
    if not rest:
        raise UserError(f"{command}: name a file")
    return rest


def _read_line(stdin: TextIO) -> str:
    line = stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def _shortened(text: str, most: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
