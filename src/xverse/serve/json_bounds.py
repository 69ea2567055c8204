"""Bounds on JSON text that a grammar alone does not have, so that every reply comes to an end.

A grammar permits numbers of any length, lists of any length and repeated names; a model that has lost its way
writes them until the token limit. The bounds are so wide that they change no sensible reply. They only take
tokens away where others remain, so that the grammar can always be satisfied.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

INTEGER, FRACTION, EXPONENT = 19, 17, 3  # digits: those of 64-bit numbers
_ZEROS = 14  # digits of a fraction after which a number that cannot end continues with another digit than 0
DEPTH = 32  # of lists and objects inside each other
MEMBERS = 1000  # of one list or object
REPEATS, PERIOD = 32, 4  # members after which a list that repeats up to PERIOD members ends

_DIGITS = frozenset(b"0123456789")
_LEADING = re.compile(rb"[0-9]*")
_QUOTE = re.compile(rb'(?:[^"\\]|\\.)*"')
Mask = NDArray[np.uint8]  # one bit per token, the lowest first


class Tokens:
    """The tokens of a vocabulary by the characters that matter here, as masks."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.bytes = tokens
        self.opening = self._matching(rb"[\[{]")
        self.opening_after_string = self._matching(rb'".*[\[{]')
        self.comma = self._matching(rb",")
        self.comma_after_string = self._matching(rb'".*,')
        self.comma_after_end = self._matching(rb"[\]}].*,")
        self.quote = self._matching(rb'"')
        self.zeros = self._matching(rb"^0+(?![0-9])")
        self._leading = [len(_LEADING.match(token)[0]) for token in tokens]  # type: ignore[index]
        self._longest = max(self._leading)

    def _matching(self, pattern: bytes) -> Mask:
        found = re.compile(pattern, re.DOTALL)
        return np.packbits([found.search(token) is not None for token in self.bytes], bitorder="little")

    @functools.cache  # noqa: B019 - lives as long as the process
    def more_digits_than(self, count: int) -> Mask | None:
        """Tokens that begin with more digits; None: there are none."""
        if count >= self._longest:
            return None
        return np.packbits([leading > count for leading in self._leading], bitorder="little")


@dataclass(slots=True)
class _Container:
    kind: int  # ord("[") or ord("{")
    begin: int = 0  # of the current member in the text
    items: list[bytes] = field(default_factory=list)  # of a list
    names: set[str] = field(default_factory=set)  # of an object
    count: int = 1  # members so far, with the current one


class Written:
    """The text of a reply so far, and what may not follow it."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._text = bytearray()
        self._inside: list[_Container] = []
        self._string = -1  # where the current string began, or -1
        self._escaped = False
        self._naming = False  # whether the next string is a name
        self._limit, self._digits = 0, 0  # of the current number's part; 0: not in a number

    def add(self, token: int) -> None:
        for byte in self._tokens.bytes[token]:
            self._byte(byte)
            self._text.append(byte)

    def _byte(self, byte: int) -> None:
        if self._string >= 0:
            if self._escaped:
                self._escaped = False
            elif byte == ord("\\"):
                self._escaped = True
            elif byte == ord('"'):
                if self._naming and self._inside:
                    self._inside[-1].names.add(_decoded(self._text[self._string :]))
                self._string = -1
            return
        if byte in _DIGITS:
            if not self._limit:
                self._limit, self._digits = INTEGER, 0
            self._digits += 1
            return
        if self._limit and byte == ord("."):
            self._limit, self._digits = FRACTION, 0
        elif self._limit and byte in b"eE":
            self._limit, self._digits = EXPONENT, 0
        elif not (self._limit == EXPONENT and byte in b"+-"):
            self._limit = 0
        if byte == ord('"'):
            self._string = len(self._text) + 1
        elif byte in b"[{":
            self._inside.append(_Container(byte, len(self._text) + 1))
            self._naming = byte == ord("{")
        elif byte in b"]}" and self._inside:
            self._inside.pop()
            self._naming = False
        elif byte == ord(",") and self._inside:
            top = self._inside[-1]
            if top.kind == ord("["):
                top.items.append(bytes(self._text[top.begin :]).strip())
                top.begin = len(self._text) + 1
            top.count += 1
            self._naming = top.kind == ord("{")
        elif byte == ord(":"):
            self._naming = False

    def bounded(self, mask: bytes) -> bytes:
        """``mask`` without the tokens that would exceed a bound, unless no token remained."""
        allowed = np.frombuffer(mask, dtype=np.uint8)
        for forbidden in self._forbidden(allowed):
            if forbidden is not None:
                rest = allowed.copy()
                rest[: len(forbidden)] &= ~forbidden
                if rest.any():
                    allowed = rest
        return allowed.tobytes()

    def _forbidden(self, allowed: Mask) -> list[Mask | None]:
        tokens, inside = self._tokens, self._inside
        quoted = self._string >= 0
        found: list[Mask | None] = []
        if self._limit:
            found.append(tokens.more_digits_than(max(0, self._limit - self._digits)))
            if self._limit == FRACTION and self._digits >= _ZEROS and self._unfinished(allowed):
                found.append(tokens.zeros)  # the number must exceed its bound
        if len(inside) >= DEPTH:
            found.append(tokens.opening_after_string if quoted else tokens.opening)
        if inside and self._full(inside[-1]):
            found.append(tokens.comma_after_string if quoted else tokens.comma)
        if any(outer.count >= MEMBERS or len(outer.items) >= REPEATS for outer in inside[:-1]):
            found.append(tokens.comma_after_end)
        if quoted and self._naming and inside and inside[-1].names:
            found.append(self._repeated_names(allowed))
        return found

    def _unfinished(self, allowed: Mask) -> bool:
        """Whether the current number cannot end here."""
        digits = self._tokens.more_digits_than(0)
        return digits is not None and not (allowed[: len(digits)] & ~digits).any()

    def _full(self, container: _Container) -> bool:
        """Whether the current member should be the last one."""
        if container.count >= MEMBERS:
            return True
        if container.kind == ord("{"):  # its names are used up if one had to be repeated
            return not self._naming and len(container.names) < container.count
        if len(container.items) < REPEATS:
            return False
        last = [*container.items[-REPEATS:], bytes(self._text[container.begin :]).strip()]
        return any(last[period:] == last[:-period] for period in range(1, PERIOD + 1))

    def _repeated_names(self, allowed: Mask) -> Mask | None:
        """Tokens that end the current name as one that the object has already."""
        found = np.zeros(8 * len(self._tokens.quote), dtype=bool)
        begun = bytes(self._text[self._string :])
        names = self._inside[-1].names
        closing = np.unpackbits(allowed[: len(found) // 8] & self._tokens.quote, bitorder="little")
        for token in np.flatnonzero(closing).tolist():
            end = _QUOTE.match(begun + self._tokens.bytes[token])
            if end is not None and _decoded(end[0][:-1]) in names:
                found[token] = True
        return np.packbits(found, bitorder="little") if found.any() else None


def _decoded(text: bytes | bytearray) -> str:
    """The inside of a JSON string."""
    try:
        value: Any = json.loads(b'"' + bytes(text) + b'"')
    except ValueError:
        return bytes(text).decode(errors="replace")
    return str(value)
