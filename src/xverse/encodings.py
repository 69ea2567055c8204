"""The encoding of a text file: UTF-8 unless a byte order mark, the bytes or the user say otherwise."""

from __future__ import annotations

import codecs
import io
import unicodedata
from collections.abc import Iterator
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
        works = (
            codec._is_text_encoding
            and codec.incrementaldecoder(_INVALID).decode(codec.encode("a")[0], final=True) == "a"
        )
    except (LookupError, ValueError, TypeError):
        works = False
    if not works:
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


def resolve(name: str, head: bytes) -> str:
    """The encoding ``name`` of a text that begins with ``head``, with its byte order: that of its mark, or of
    what it decodes to, or little-endian."""
    if name not in ("utf-16", "utf-32"):
        return name
    found = detect(head)
    return found if found.startswith(name) else f"{name}-le"


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


class _Stream(io.RawIOBase):
    """The bytes in ``chunks``, which are made of ``stream``."""

    def __init__(self, stream: BinaryIO, chunks: Iterator[bytes]) -> None:
        self.stream, self.chunks, self.rest = stream, chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        while not self.rest:
            chunk = next(self.chunks, None)
            if chunk is None:
                return 0
            self.rest = chunk
        count = min(len(buffer), len(self.rest))
        buffer[:count] = self.rest[:count]
        self.rest = self.rest[count:]
        return count

    def close(self) -> None:
        self.stream.close()
        super().close()


def converted(stream: BinaryIO, chunks: Iterator[bytes]) -> BinaryIO:
    """A stream of ``chunks``, which are made of ``stream``; closes ``stream`` with it."""
    return cast(BinaryIO, io.BufferedReader(_Stream(stream, chunks), 1 << 16))


def transcoded(stream: BinaryIO, encoding: str) -> BinaryIO:
    """A stream in UTF-8 of one in ``encoding``, which it closes. What is invalid stays invalid."""
    return converted(stream, _transcode(stream, encoding))


def _transcode(stream: BinaryIO, encoding: str) -> Iterator[bytes]:
    decoder, first, data = codecs.getincrementaldecoder(encoding)(_INVALID), True, b" "
    while data:
        data = stream.read(HEAD)
        text = decoder.decode(data, final=not data)
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        yield text.encode(UTF8, "surrogatepass")
