"""Splitting GAOKAO-Bench's objective questions, which are scanned texts.

An item is one text with one or several sub-questions and their options. ``parts`` finds the sub-questions by
their numbers and their options by letters. What cannot be found stays in the text: a sub-question without
separate options is asked with the whole item.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

_STOP = "[．.、。:：]"
# Number of a sub-question: "41." "（2）" "3、" anywhere, "25 What" at the beginning of a line.
_NUMBER = re.compile(
    rf"[（(]\s*(\d{{1,2}})\s*[）)]|(?<![\d.,$\\])(\d{{1,2}})\s*{_STOP}(?!\d)|^\s*(\d{{1,2}})(?=\s+\S)",
    re.MULTILINE,
)
# Letter of an option: with a stop, or as in scans "A 一脉相承", "CThey lived".
_LETTER = re.compile(rf"(?<![A-Za-z$\\{{])([A-G])\s*{_STOP}")
_LOOSE = re.compile(
    rf"(?<![A-Za-z$\\{{])([A-G])\s*{_STOP}|(?<=[\s）)])([A-G])(?=\s+\S)|^\s*([A-G])(?=[A-Z])", re.MULTILINE
)
_BLANK = re.compile(r"[ \t\n\u3000]+")


@dataclass(frozen=True)
class Part:
    """One sub-question: the text shared with the others, its text, its options (empty if they are within one
    of these), and its number, if it has one."""

    shared: str
    text: str
    options: tuple[str, ...]
    number: int | None


def parts(text: str, count: int) -> list[Part]:
    """The ``count`` sub-questions of an item."""
    text = text.strip()
    if count == 1:
        stem, options = split_options(text)
        return [Part("", stem, options, None)]
    places = _numbers(text, count)
    if places is None:
        places = _by_options(text, count)
    if places is None:
        # Blanks in a text with common options: every sub-question needs the whole text.
        first = _first_blank(text, count)
        stem, options = split_options(text)
        return [Part(stem, "", options, None if first is None else first + offset) for offset in range(count)]
    ends = [start for start, _ in places[1:]] + [len(text)]
    shared = text[: places[0][0]].strip()
    result = []
    for (start, number), end in zip(places, ends, strict=True):
        stem, options = split_options(text[start:end].strip())
        result.append(Part(shared, stem, options, number or None))
    return result


def split_options(text: str, letters: str = "ABCDEFG") -> tuple[str, tuple[str, ...]]:
    """The text before the options, and the options; none unless A to D (or further) follow in order."""
    for pattern in (_LETTER, _LOOSE):
        marks = _marks(text, pattern)
        # The last A that the others follow, because the text may mention "A." before.
        for first in reversed([index for index, mark in enumerate(marks) if mark[2] == "A"]):
            chain = [marks[first]]
            for mark in marks[first + 1 :]:
                if len(chain) < len(letters) and mark[2] == letters[len(chain)]:
                    chain.append(mark)
            starts = [end for _, end, _ in chain]
            ends = [start for start, _, _ in chain[1:]] + [len(text)]
            options = tuple(_BLANK.sub(" ", text[a:b]).strip() for a, b in zip(starts, ends, strict=True))
            if len(options) >= 4 and all(options):
                return text[: chain[0][0]].strip(), options
    return text, ()


def _marks(text: str, pattern: re.Pattern[str]) -> list[tuple[int, int, str]]:
    """Begin, end and letter of every option letter."""
    return [(m.start(), m.end(), m[m.lastindex or 0]) for m in pattern.finditer(text)]


def _has_options(text: str) -> bool:
    """Whether A, B and C occur in order; one of four may be misprinted."""
    letters = "".join(letter for _, _, letter in _marks(text, _LOOSE))
    return re.search("A.*B.*C", letters) is not None


def _numbers(text: str, count: int) -> list[tuple[int, int]] | None:
    """(place, number) of ``count`` consecutive numbers, each followed by options; None if there are none."""
    numbers = [(m.start(), int(m[m.lastindex or 0])) for m in _NUMBER.finditer(text)]
    for first in range(len(numbers)):
        chain = [numbers[first]]
        for place in numbers[first + 1 :]:
            follows = len(chain) < count and place[1] == chain[-1][1] + 1
            if follows and _has_options(text[chain[-1][0] : place[0]]):
                chain.append(place)
        if len(chain) == count and _has_options(text[chain[-1][0] :]):
            return chain
    return None


def _by_options(text: str, count: int) -> list[tuple[int, int]] | None:
    """For missing or wrong numbers: ``count`` groups of A to D, each beginning with the line after the
    previous group."""
    groups: list[list[int]] = []
    for start, _, letter in _marks(text, _LETTER):
        if letter == "A":
            groups.append([start])
        elif groups and letter == "ABCDEFG"[len(groups[-1])]:
            groups[-1].append(start)
    groups = [group for group in groups if len(group) >= 4]
    if len(groups) != count:
        return None
    places = [text.rfind("\n", 0, groups[0][0]) + 1]
    for before, after in itertools.pairwise(groups):
        number = next((m.start() for m in _NUMBER.finditer(text, before[-1]) if m.start() < after[0]), None)
        line = text.rfind("\n", before[-1], after[0])
        places.append(number if number is not None else line + 1 if line >= 0 else after[0])
    return [(place, 0) for place in places]


def _first_blank(text: str, count: int) -> int | None:
    """The number of the first of ``count`` numbered blanks in a text."""
    numbers = {int(match) for match in re.findall(r"(?<!\d)(\d{1,2})(?!\d)", text)}
    firsts = [n for n in sorted(numbers) if all(n + offset in numbers for offset in range(count))]
    return firsts[-1] if firsts else None
