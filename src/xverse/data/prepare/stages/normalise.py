"""Normalisation: one Unicode form and one kind of line end, without changing the content of a text.

Only composition (NFC): compatibility forms (NFKC) would turn ② into 2 and ｆｕｌｌ width into half, which
XVERSE-7B's tokenizer does not do either. Joiners (U+200C, U+200D) are kept, because Persian, Hindi and emoji
need them; so is indentation. In code, only line ends and control characters change.
"""

from __future__ import annotations

import re
import unicodedata

# Control characters except tab and line feed; soft hyphen, zero-width space, word joiner, byte order mark.
_REMOVED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u2060\ufeff\ufff9-\ufffb]")
_LINE_END = re.compile("\r\n?|[\x85\u2028\u2029]")
_TRAILING = re.compile(r"[ \t\u00a0\u3000]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{4,}")


def normalise(text: str, code: bool = False) -> str:
    """The text in NFC with ``\\n`` as line end, without control characters and invisible marks.

    Prose also loses trailing blanks and more than two consecutive empty lines. Idempotent.
    """
    text = _REMOVED.sub("", _LINE_END.sub("\n", text))
    if code:
        return text
    return _BLANK_LINES.sub("\n\n\n", _TRAILING.sub("", unicodedata.normalize("NFC", text))).strip("\n")
