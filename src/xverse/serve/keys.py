"""API keys: one file with a key per line, and one in the environment."""

from __future__ import annotations

import os
from pathlib import Path

from xverse.config import UserError

VARIABLE = "XVERSE_API_KEY"


def read_keys(path: str | None) -> list[str]:
    """The keys in a file, where blank lines and lines that begin with # are ignored, and the one in the
    environment. Raises UserError for a file that cannot be read or has no key, and for a key that cannot be
    sent in an HTTP header."""
    keys: dict[str, str] = {}
    if path is not None:
        try:
            text = Path(path).expanduser().read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise UserError(f"--api-key-file: {path!r} cannot be read ({error.strerror or error})") from None
        except UnicodeDecodeError:
            raise UserError(f"--api-key-file: {path!r} is not a text file in UTF-8") from None
        except ValueError as error:  # a NUL in the name
            raise UserError(f"--api-key-file: {path!r} cannot be read ({error})") from None
        lines = [line.strip(" \t\r") for line in text.split("\n")]
        for number, line in enumerate(lines, 1):
            if line and not line.startswith("#"):
                keys[line] = f"--api-key-file: {path}, line {number}"
        if not keys:
            raise UserError(f"--api-key-file: {path!r} contains no key; write one key per line")
    if os.environ.get(VARIABLE):
        keys[os.environ[VARIABLE]] = VARIABLE
    for key, where in keys.items():
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise UserError(f"{where}: a key must be printable ASCII without spaces")
    return list(keys)
