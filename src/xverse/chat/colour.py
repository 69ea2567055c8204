"""Colours for Markdown as it arrives: no character is removed, and only a line's first ones wait."""

from __future__ import annotations

import os
import re
from typing import TextIO

_RESET, _CODE, _STRONG, _HEADING = "\x1b[0m", "\x1b[36m", "\x1b[1m", "\x1b[1;35m"
_UNDECIDED = re.compile(r" {0,3}(`{0,2}|~{0,2}|#{1,6})$")  # may become a fence or a heading
_FENCE = re.compile(r" {0,3}(```|~~~)")
_HEADING_START = re.compile(r" {0,3}#{1,6}[ \t]")


def colours(stdout: TextIO) -> bool:
    """Whether to colour: a terminal that can, and no NO_COLOR (no-color.org)."""
    return stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Markdown:
    """``push`` returns the text with escape sequences for code, strong text and headings. Without these
    sequences the outputs joined are the inputs joined."""

    def __init__(self) -> None:
        self._line = ""  # the line so far, while its kind is undecided
        self._decided = False
        self._fence = ""  # the marker of an open code block
        self._style = ""  # of the line
        self._code = self._strong = False
        self._star = False  # a single * that may begin **

    def push(self, text: str) -> str:
        return "".join(map(self._character, text))

    def finish(self) -> str:
        return self._begin() + self._stars() + self._end()

    def _character(self, character: str) -> str:
        if character == "\n":
            return self._begin() + self._stars() + self._end() + "\n"
        if not self._decided:
            self._line += character
            if _UNDECIDED.match(self._line):
                return ""
            return self._begin()
        return self._inline(character)

    def _begin(self) -> str:
        """Decide what kind of line this is, and write what was held back."""
        if self._decided:
            return ""
        line, self._line, self._decided = self._line, "", True
        fence = _FENCE.match(line)
        if fence and self._fence in ("", fence[1]):
            self._fence = "" if self._fence else fence[1]
            self._style = _CODE
            return _CODE + line
        if self._fence:
            self._style = _CODE
            return _CODE + line if line else ""
        if _HEADING_START.match(line):
            self._style = _HEADING
            return _HEADING + line
        return "".join(map(self._inline, line))

    def _inline(self, character: str) -> str:
        if self._style:
            return character
        if character == "*" and not self._code:
            if not self._star:
                self._star = True
                return ""
            self._star, self._strong = False, not self._strong
            return f"{_STRONG}**" if self._strong else f"**{_RESET}"
        before = self._stars()
        if character == "`":
            self._code = not self._code
            return before + (f"{_CODE}`" if self._code else f"`{_RESET}{_STRONG if self._strong else ''}")
        return before + character

    def _stars(self) -> str:
        held, self._star = "*" * self._star, False
        return held

    def _end(self) -> str:
        styled = self._style or self._code or self._strong
        self._style, self._code, self._strong, self._decided = "", False, False, False
        return _RESET if styled else ""
