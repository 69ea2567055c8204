"""Taking examination papers' running text apart: several questions in one text, options inside the text.

GAOKAO-Bench keeps an item as the paper printed it, options and all, and a reading passage together with its
three to twenty questions. Nothing is rewritten here: the parts are pieces of the text, found by the numbers and
letters that papers put before them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LETTERS = "ABCDEFG"
# The numbers of questions, as papers write them: "56." and "（1）"; last, with the dot forgotten: "25 What".
_DOTTED = r"(?<![\d.．A-Za-z$\\])(\d{1,2})\s*[.．、]\s*"
_STYLES = (
    re.compile(_DOTTED),
    re.compile(r"[(（]\s*(\d{1,2})\s*[)）]\s*"),
    re.compile(
        rf"(?:{_DOTTED}|(?<=[a-z])(\d{{2}})\.\s*(?=A)|(?:^|(?<=\s))(\d{{1,2}})(?=\s*[A-Z(（\u4e00-\u9fff]))",
        re.MULTILINE,
    ),
)
# The letters of options, likewise. "Washington, D.C." is no letter of an option.
_MARKS = (
    r"(?<![A-Za-z])(?<![A-Z]\.){letter}\s*[.．、:：,，)）](?![A-Z]\.)",
    r"(?:^|(?<=\s)){letter}(?=\s|[\u4e00-\u9fff])",
    r"^{letter}(?=[A-Z][a-z])",
)


@dataclass(frozen=True)
class Part:
    """One question: its text without the options (the passage not included), and the options in order.

    ``options`` is empty where their letters could not be found; ``text`` then holds them.
    """

    text: str
    options: tuple[str, ...]


def take_options(text: str, count: int = 4) -> Part:
    """Separate a question from its ``count`` options, which begin with "A.", "B．" and so on at its end."""
    starts = _option_starts(text, count)
    if starts is None:
        return Part(_trim(text), ())
    ends = [begin for begin, _ in starts[1:]] + [len(text)]
    options = tuple(_one_line(text[after:end]) for (_, after), end in zip(starts, ends, strict=True))
    if not all(options):
        return Part(_trim(text), ())
    return Part(_trim(text[: starts[0][0]]), options)


def split_parts(text: str, count: int) -> tuple[str, list[str]] | None:
    """Split a text of ``count`` numbered questions: what stands before them, and each with its number.

    The pieces joined are the text again. None where no run of ``count`` consecutive numbers has the letters
    A to D (or three of them) behind every number.
    """
    for letters in (4, 3):  # three, where a paper has no D
        for style in _STYLES:
            found = [(match.start(), int(match[match.lastindex or 0])) for match in style.finditer(text)]
            for first in sorted({number for _, number in found}, reverse=True):
                starts = _run(text, found, range(first, first + count), letters)
                if starts is not None:
                    ends = [*starts[1:], len(text)]
                    return text[: starts[0]], [text[a:b] for a, b in zip(starts, ends, strict=True)]
    return None


def blanks(text: str, count: int) -> list[str] | None:
    """The numbers of a text's ``count`` consecutive blanks, such as 71 to 75, or None."""
    numbers = [int(found) for found in re.findall(r"(?<![\d.,，:：$￡])(\d{1,2})(?![\d,，:：%])", text)]
    for first in sorted(set(numbers), reverse=True):
        places = iter(numbers)
        if all(first + step in places for step in range(count)):  # in this order
            return [str(first + step) for step in range(count)]
    return None


def _run(text: str, found: list[tuple[int, int]], numbers: range, letters: int) -> list[int] | None:
    """Positions of ``numbers``, from the last one back, each before a question with its options' letters."""
    end, starts = len(text), []
    for number in reversed(numbers):
        places = [
            at
            for at, each in found
            if each == number and at < end and _option_starts(text[at:end], letters) is not None
        ]
        if not places:
            return None
        # At the beginning of a line before anywhere else: options and passages hold numbers too.
        lines = [at for at in places if not text[:at].rpartition("\n")[2].strip()]
        end = (lines or places)[-1]
        starts.append(end)
    return starts[::-1]


def _option_starts(text: str, count: int) -> list[tuple[int, int]] | None:
    """Where each option's letter begins, and where its text does, from the last letter of the text back."""
    starts: list[tuple[int, int]] = []
    end = len(text)
    for letter in reversed(LETTERS[:count]):
        for mark in _MARKS:
            pattern = re.compile(mark.format(letter=letter), re.MULTILINE)
            places = [match for match in pattern.finditer(text) if match.end() <= end]
            if places:
                starts.append(places[-1].span())
                end = places[-1].start()
                break
        else:
            return None
    return starts[::-1]


def _trim(text: str) -> str:
    return text.strip().strip("\u3000").strip()


def _one_line(text: str) -> str:
    return " ".join(part.strip() for part in text.split("\n") if part.strip()).strip()
