"""The encoding of a text file: UTF-8 unless a byte order mark, the bytes or the user say otherwise."""

from __future__ import annotations

import codecs
import io
import unicodedata
from typing import BinaryIO, cast

from xverse.config import UserError

UTF8 = "utf-8"
HEAD = 1 << 16  # bytes that are looked at
# Longest first: the mark of UTF-16 begins that of UTF-32.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: UTF8,
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
# The most frequent characters of Chinese text, simplified and traditional: over a third of any prose, under a
# twentieth of what Big5, Shift JIS, EUC-KR or Cyrillic bytes give when they are read as GB18030.
_COMMON = frozenset(
    "的一是不了在人有我他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后"
    "这個國說們為時會著過學對裡後"
)
_INVALID = "xverse-invalid"
codecs.register_error(_INVALID, lambda error: ("\udc80", error.end))  # type: ignore[attr-defined]


def check_encoding(name: str) -> str:
    """The codec's name of an encoding. Raises UserError for one that Python does not know."""
    try:
        codec = codecs.lookup(name)
    except (LookupError, ValueError):
        codec = None
    if codec is None or not codec._is_text_encoding:
        raise UserError(f"unknown encoding '{name}'; for example utf-8, utf-16, gb18030, big5 or cp1251")
    return UTF8 if codec.name in (UTF8, "utf-8-sig") else codec.name


def detect(head: bytes) -> str:
    """The encoding of a text that begins with ``head``.

    UTF-16 and UTF-32 by their marks, UTF-16 also by what it decodes to. GB18030 if most
    lines with other than ASCII characters are not UTF-8, and its frequent characters are frequent. A file
    with a few damaged lines stays UTF-8.
    """
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name
    valid = _decodes(head, UTF8)
    if not valid or 25 * head.count(0) > len(head):
        for name in ("utf-16-le", "utf-16-be"):
            if _is_utf16(head, name):
                return name
    if valid:
        return UTF8
    lines = [line for line in head.split(b"\n")[:-1] or [head] if not line.isascii()]
    if 2 * sum(not _decodes(line, UTF8) for line in lines) > len(lines) and _is_chinese(lines):
        return "gb18030"
    return UTF8


def _decodes(data: bytes, encoding: str) -> bool:
    """Whether data is valid in an encoding, but for a character cut at the end."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(data)
    except UnicodeDecodeError:
        return False
    return True


def _is_utf16(head: bytes, name: str) -> bool:
    """Whether a text without a mark is UTF-16: with blanks or punctuation, and only characters of texts."""
    if not _decodes(head, name):
        return False
    text = codecs.getincrementaldecoder(name)().decode(head)[:4_096]
    odd = (character for character in text if unicodedata.category(character) in ("Cn", "Co", "Cc"))
    strange = any(character not in "\t\n\r" for character in odd)
    marks = sum(character in " \n,.，。、" for character in text)
    return not strange and 50 * marks > len(text)


def _is_chinese(lines: list[bytes]) -> bool:
    """Whether most lines are GB18030, and what they say is Chinese."""
    decoded = [line for line in lines if _decodes(line, "gb18030")]
    text = "".join(codecs.getincrementaldecoder("gb18030")().decode(line) for line in decoded)
    ideographs = [character for character in text if "\u3400" <= character <= "\u9fff"]
    common = sum(character in _COMMON for character in ideographs)
    return 2 * len(decoded) > len(lines) and 10 * common > len(ideographs) > 3


class _Transcoder(io.RawIOBase):
    """A stream in UTF-8 of one in another encoding; what is invalid there is invalid UTF-8 here."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self.stream = stream
        self.decoder = codecs.getincrementaldecoder(encoding)(_INVALID)
        self.rest, self.first, self.ended = b"", True, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        while not self.rest and not self.ended:
            data = self.stream.read(HEAD)
            text = self.decoder.decode(data, final=not data)
            self.ended = not data
            if self.first and text:
                text, self.first = text.removeprefix("\ufeff"), False
            self.rest = text.encode(UTF8, "surrogatepass")
        count = min(len(buffer), len(self.rest))
        buffer[:count] = self.rest[:count]
        self.rest = self.rest[count:]
        return count

    def close(self) -> None:
        self.stream.close()
        super().close()


def transcoded(stream: BinaryIO, encoding: str) -> BinaryIO:
    """A stream in UTF-8 of a stream in ``encoding``, which it closes."""
    return cast(BinaryIO, io.BufferedReader(_Transcoder(stream, encoding), 1 << 16))
