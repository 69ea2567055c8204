"""Model directories at URLs: s3://, oss://, gs://, hdfs://, https:// and whatever else fsspec reads.

They are copied to the cache, $XVERSE_CACHE or ~/.cache/xverse. A copy is complete or absent, and is made
again if a file at the URL has another size or version.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from xverse.config import UserError
from xverse.files import alone, atomic_directory
from xverse.log import notice
from xverse.remote import find, open_url, versions
from xverse.texts import read_json

RECORD = "xverse_source.json"  # in a copy: what it was made from


def fetch(url: str, choose: Callable[[Iterable[str]], list[str]]) -> Path:
    """The copy of a model directory, of which ``choose`` selects files by name.

    Raises UserError if the directory cannot be listed or read, has no model, or if the disk is full.
    """
    url = url.rstrip("/")
    cache = Path(os.environ.get("XVERSE_CACHE") or "~/.cache/xverse").expanduser() / "models"
    folder = cache / f"{url.rpartition('/')[2]}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    files = {path.rpartition("/")[2]: path for path, _ in find(url) if path.rpartition("/")[0] == url}
    if not files:
        raise UserError(f"{url}: no model directory here: no files")
    names = choose(files)
    source: dict[str, Any] = {name: versions(files[name]) for name in names}
    with _alone(cache / f".{folder.name}.lock"):
        if (folder / RECORD).exists() and read_json(folder / RECORD) == source:
            return folder
        notice(f"{url}: copied to {folder}")
        with atomic_directory(folder) as temporary:
            for name in names:
                with open_url(files[name]) as stream, (temporary / name).open("wb") as file:
                    shutil.copyfileobj(stream, file, 8 << 20)
            (temporary / RECORD).write_text(json.dumps(source), encoding="utf-8")
    return folder


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait for another process that copies the model, such as another rank of a run."""
    busy = f"{lock}: another process is copying this model"
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(alone(lock, busy))
                break
            except UserError as error:
                if str(error) != busy:
                    raise
                time.sleep(0.5)
        yield
