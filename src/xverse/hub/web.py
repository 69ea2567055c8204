"""Files and archives at plain URLs, bounded in size and kept in memory; callers verify and store them."""

from __future__ import annotations

import io
import os
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator

from xverse.config import UserError

MAX_BYTES = 500_000_000  # of a download, and of what an archive unpacks to
HUGGING_FACE = "https://huggingface.co"


def download(url: str) -> bytes:
    """The bytes at ``url``; HF_ENDPOINT replaces the host of Hugging Face's URLs.

    Raises UserError if it cannot be fetched or is larger than ``MAX_BYTES``.
    """
    endpoint = os.environ.get("HF_ENDPOINT")
    if endpoint and url.startswith(HUGGING_FACE):
        url = endpoint.rstrip("/") + url.removeprefix(HUGGING_FACE)
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            data: bytes = response.read(MAX_BYTES + 1)
    except (urllib.error.URLError, OSError) as error:
        raise UserError(f"{url}: cannot be fetched ({getattr(error, 'reason', error)})") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{url}: larger than {MAX_BYTES} bytes")
    return data


def members(data: bytes, url: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the regular files in a zip or tar archive that came from ``url``.

    Raises UserError for a damaged archive and for one that unpacks to more than ``MAX_BYTES``.
    """
    left = MAX_BYTES
    for name, content in _unpack(data, url):
        left -= len(content)
        if left < 0:
            raise UserError(f"{url}: unpacks to more than {MAX_BYTES} bytes")
        yield name, content


def _unpack(data: bytes, url: str) -> Iterator[tuple[str, bytes]]:
    try:
        if url.endswith(".zip"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                for info in archive.infolist():
                    if not info.is_dir() and info.file_size <= MAX_BYTES:
                        yield info.filename, archive.read(info)
            return
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isreg() and member.size <= MAX_BYTES else None
                if file is not None:
                    yield member.name.removeprefix("./"), file.read()
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise UserError(f"{url}: not an archive, or a damaged one ({error})") from None
