"""The prompt: line editing with wide characters, completion of commands, and a history across sessions."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from xverse.chat.translations import COMMANDS, translated
from xverse.log import notice

if TYPE_CHECKING:
    from prompt_toolkit.history import History

_MOST_BYTES = 1024**2  # a longer history loses its older half


def prompter(history: bool) -> Callable[[], str]:
    """A function that reads one message; pasted line breaks stay in it."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        "> ",
        completer=WordCompleter(list(COMMANDS), sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
        history=_kept(history_file()) if history else InMemoryHistory(),
    )
    return session.prompt


def history_file() -> Path:
    """Where the XDG base directory specification puts it."""
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state"
    return base / "xverse" / "history"


def _kept(path: Path) -> History:
    """The history in ``path``, which only its owner can read; in memory where it cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Kept(FileHistory):
        def store_string(self, string: str) -> None:
            try:
                super().store_string(string)
            except OSError as error:
                notice(translated("no history", reason=f"{path} ({error.strerror})"))

    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
        path.chmod(0o600)
        if path.stat().st_size > _MOST_BYTES:
            recent = path.read_bytes()[-_MOST_BYTES // 2 :]
            path.write_bytes(recent[recent.find(b"\n# ") + 1 :])  # entries begin with a comment
    except OSError as error:
        notice(translated("no history", reason=f"{path} ({error.strerror})"))
        return InMemoryHistory()
    return Kept(str(path))
