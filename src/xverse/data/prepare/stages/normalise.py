"""Normalising: one Unicode form and one kind of line end, without touching what a text says.

Composed form (NFC) only: the compatibility forms (NFKC) would turn ② into 2 and ｆｕｌｌ width into half,
which XVERSE-7B's tokenizer does not do either. Joiners (U+200C, U+200D) stay: Persian, Hindi and emoji need
them. Indentation stays, and in code everything but line ends and control characters does.
"""

from __future__ import annotations

import re
import unicodedata

# Control characters but tab and line feed; soft hyphen, zero-width space, word joiner, byte order mark.
_REMOVED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u2060\ufeff\ufff9-\ufffb]")
_LINE_END = re.compile("\r\n?|[\x85\u2028\u2029]")
_TRAILING = re.compile(r"[ \t\u00a0\u3000]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{4,}")


def normalise(text: str, code: bool = False) -> str:
    """The text in NFC with ``\\n`` for line ends, without control characters and invisible marks.

    Prose also loses blanks at its lines' ends and more than two empty lines in a row. Applying it twice
    changes nothing more.
    """
    text = _REMOVED.sub("", _LINE_END.sub("\n", text))
    if code:
        return text
    return _BLANK_LINES.sub("\n\n\n", _TRAILING.sub("", unicodedata.normalize("NFC", text))).strip("\n")
