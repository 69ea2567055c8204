"""Tool calls in a growing reply: what is content, and which pieces of calls are certain."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from xverse.tokenizer.tools import CLOSE, OPEN

_SPACES = " \t\r\n"


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class CallPiece:
    """``name`` begins the call number ``index``; the ``arguments`` of its pieces add up to JSON text."""

    index: int
    name: str | None
    arguments: str


def collected(pieces: Iterable[Content | CallPiece]) -> tuple[str, list[dict[str, str]]]:
    """The whole content, and the calls with their names and arguments."""
    content, calls = "", list[dict[str, str]]()
    for piece in pieces:
        if isinstance(piece, Content):
            content += piece.text
        elif piece.name is not None:
            calls.append({"name": piece.name, "arguments": piece.arguments})
        else:
            calls[-1]["arguments"] += piece.arguments
    return content, calls


def read_arguments(arguments: str) -> Any:
    """The value of a call's arguments; None if they are incomplete, as of a reply that was cut off."""
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return None


class CallParser:
    """Push the pieces of a reply; ``end`` ends it. The pieces that both return are final.

    ``names`` are the tools that may be called; without any the whole text is content. A call is recognised
    once its name is complete and its arguments begin. Text that only resembles a call is content. With calls,
    space around the content is dropped.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._text = ""  # not decided yet
        self._state = self._content if names else self._plain
        self._space = ""  # held back: it may be the end of the content
        self._has_content = False
        self._scan = _Value()
        self.calls = 0
        self.open = False  # within a call

    def push(self, text: str) -> list[Content | CallPiece]:
        self._text += text
        pieces: list[Content | CallPiece] = []
        while (found := self._state()) is not None:
            pieces += found
        return pieces

    def end(self, cut: bool) -> list[Content | CallPiece]:
        """The rest. ``cut``: a limit or a stop text ended the reply, so that an unfinished call is a call."""
        pieces: list[Content | CallPiece] = []
        if self._state == self._other or self._state == self._head:
            possible = self._possible() if cut else []
            if len(possible) == 1:
                pieces.append(self._begin(possible[0], ""))
            elif not possible:
                pieces += self._whole(self._text, "")
        elif self._state == self._content or not self._ends_call():
            pieces += self._content_of(self._text)
        if self._space and not self.calls:
            pieces.append(Content(self._space))
        return pieces

    def _ends_call(self) -> bool:
        """Whether the rest is in the arguments of a call, or is the beginning of its end."""
        return self._state == self._arguments or ("}" + CLOSE).startswith("".join(self._text.split()))

    # Each state consumes what it can of the text and returns its pieces, or None if it needs more text.

    def _plain(self) -> list[Content | CallPiece] | None:
        text, self._text = self._text, ""
        return [Content(text)] if text else None

    def _content(self) -> list[Content | CallPiece] | None:
        start = self._text.find(OPEN)
        if start < 0:
            sure = len(self._text) - _overlap(self._text, OPEN)
            content, self._text = self._text[:sure], self._text[sure:]
            return self._content_of(content) if content else None
        content, self._text = self._text[:start], self._text[start + len(OPEN) :]
        self._state, self.open = self._head, True
        return self._content_of(content)

    def _head(self) -> list[Content | CallPiece] | None:
        """``{"name": NAME, "arguments": `` and the brace of the arguments."""
        name, end = _head(self._text)
        if end is None:
            return None
        if name not in self._names or self._text[end] != "{":
            self._state = self._other
            return []
        assert name is not None
        self._text = self._text[end:]
        self._scan, self._state = _Value(), self._arguments
        return [self._begin(name, "")]

    def _arguments(self) -> list[Content | CallPiece] | None:
        if not self._text:
            return None
        size = self._scan.take(self._text)
        piece, self._text = self._text[:size], self._text[size:]
        if self._scan.depth == 0:
            self._state, self.open = self._tail, False
        return [CallPiece(self.calls - 1, None, piece)]

    def _tail(self) -> list[Content | CallPiece] | None:
        """The brace of the call and the end marker."""
        rest = self._text.lstrip(_SPACES)
        if not rest:
            return None
        if rest[0] != "}":  # further fields
            end = rest.find(CLOSE)
            self._text = rest[end + len(CLOSE) :] if end >= 0 else rest
            self._state = self._content if end >= 0 else self._tail
            return [] if end >= 0 else None
        after = rest[1:].lstrip(_SPACES)
        if len(after) < len(CLOSE) and CLOSE.startswith(after):
            return None
        self._text = after.removeprefix(CLOSE) if after.startswith(CLOSE) else rest[1:]
        self._state = self._content
        return []

    def _other(self) -> list[Content | CallPiece] | None:
        """A call with other fields first, or text that only begins like one."""
        end = self._text.find(CLOSE)
        if end < 0:
            return None
        inside, self._text = self._text[:end], self._text[end + len(CLOSE) :]
        self._state = self._content
        return self._whole(inside, CLOSE)

    def _whole(self, inside: str, close: str) -> list[Content | CallPiece]:
        self.open = False
        try:
            call = json.loads(inside)
        except (ValueError, RecursionError):
            call = None
        if not isinstance(call, dict) or call.get("name") not in self._names:
            return self._content_of(OPEN + inside + close)
        return [self._begin(call["name"], _json(call.get("arguments", {})))]

    def _begin(self, name: str, arguments: str) -> CallPiece:
        self.calls += 1
        if not self._has_content:
            self._space = ""
        return CallPiece(self.calls - 1, name, arguments)

    def _content_of(self, text: str) -> list[Content | CallPiece]:
        """Content; space at its end waits until more content follows."""
        text = self._space + text
        kept = text.rstrip(_SPACES)
        self._space = text[len(kept) :]
        if not self._has_content and self.calls:
            kept = kept.lstrip(_SPACES)
        if not kept:
            if self.calls and not self._has_content:
                self._space = ""
            return []
        self._has_content = True
        return [Content(kept)]

    def _possible(self) -> list[str]:
        """The names that the call may have whose text ends here, within its head."""
        if _head(self._text)[1] is not None:
            return []
        written = self._text.partition(":")[2].lstrip(_SPACES).removeprefix('"')
        name, quote, _ = written.partition('"')
        return [each for each in self._names if each == name or (not quote and each.startswith(name))]


class _Value:
    """Finds the end of a JSON object: the brace that closes the first one."""

    def __init__(self) -> None:
        self.depth = 0
        self._in_text = self._escaped = False

    def take(self, text: str) -> int:
        """How many characters of ``text`` belong to the object; ``depth`` is 0 if it is complete."""
        for index, character in enumerate(text):
            if self._in_text:
                self._in_text = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_text = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth == 0:
                    return index + 1
        return len(text)


_HEAD = ("{", '"name"', ":", None, ",", '"arguments"', ":")  # None: the name


def _head(text: str) -> tuple[str | None, int | None]:
    """The name in the head of a call, if complete, and where its arguments begin.

    The position is None while the head may continue; for text that is not the head of a call it is 0, and the
    name is None.
    """
    name, at = None, 0
    for part in _HEAD:
        while at < len(text) and text[at] in _SPACES:
            at += 1
        if part is None:
            if at == len(text):
                return name, None
            try:
                if text[at] != '"':
                    return None, 0
                name, at = json.decoder.scanstring(text, at + 1)  # type: ignore[attr-defined]
            except ValueError:
                return name, None
        elif text.startswith(part, at):
            at += len(part)
        else:
            return (name, None) if part.startswith(text[at:]) else (None, 0)
    while at < len(text) and text[at] in _SPACES:
        at += 1
    return name, at if at < len(text) else None


def _overlap(text: str, marker: str) -> int:
    """How many characters at the end of ``text`` may begin ``marker``."""
    return next(size for size in range(len(marker) - 1, -1, -1) if text.endswith(marker[:size]))


def _json(arguments: Any) -> str:
    """JSON text that can be encoded: an unpaired surrogate remains an escape sequence. Arguments that are a
    JSON text already stay as they are."""
    if isinstance(arguments, str):
        return arguments
    text = json.dumps(arguments, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(arguments)
    return text
