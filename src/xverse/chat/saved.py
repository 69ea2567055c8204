"""Saved conversations: JSON files with a format version, written atomically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xverse.config import UserError, check_keys
from xverse.files import write_text
from xverse.texts import read_json
from xverse.tokenizer.chat import check_messages

FORMAT = "xverse-conversation"
VERSION = 1
_KEYS = ("format", "version", "messages")

Message = dict[str, str]  # role (system, user, exec, assistant) and content


def save_conversation(messages: list[Message], path: str | Path) -> None:
    """Write ``messages``. Raises UserError if there are none, or if ``path`` is another kind of file."""
    path = Path(path).expanduser()
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError("no conversation to save yet")
    text = json.dumps(
        {"format": FORMAT, "version": VERSION, "messages": messages}, ensure_ascii=False, indent=2
    )
    try:
        _check_target(path)
    except OSError as error:  # a name that is too long
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    write_text(path, text + "\n")


def load_conversation(path: str | Path) -> list[Message]:
    """The messages of a file that ``save_conversation`` wrote; the last one is the assistant's.

    Raises UserError, in one line that names the file, for anything else.
    """
    path = Path(path).expanduser()
    values = read_json(path)
    _check_header(values, path)
    try:
        check_messages(values["messages"], last=("assistant",))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return [dict(message) for message in values["messages"]]


def _check_target(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path}: is a directory; name a file in it")
    if path.exists():
        try:
            load_conversation(path)
        except UserError:
            raise UserError(f"{path}: exists and is not a conversation; choose another name") from None


def _check_header(values: Any, path: Path) -> None:
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UserError(f"{path}: not a saved conversation (its format is not '{FORMAT}')")
    if values.get("version") != VERSION:
        raise UserError(
            f"{path}: unknown format version {values.get('version')!r}; this program reads version {VERSION}"
        )
    check_keys(values, _KEYS, str(path))
    if "messages" not in values:
        raise UserError(f"{path}: missing key 'messages'")
