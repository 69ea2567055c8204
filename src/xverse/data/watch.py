"""Checking that the shards of a run do not change while it reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from xverse.config import UserError
from xverse.data.shards import Shard, StoredArray, read_header
from xverse.files import fingerprint

PART = 1 << 28


class ShardWatch:
    """A call returns what is wrong with a shard, or an empty string.

    A shard's marker is written after its tokens and offsets. A file newer than the marker is read and
    compared with the SHA-256 in the header. Each call also reads up to PART bytes of what was not compared
    yet, so that a damaged file with an old time is found, and calls stay cheap.
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._shards = list(shards)
        self._sound: dict[str, int] = {}  # modification times of files that were verified
        # Not compared yet, the first one up to ``_at``. Tokens first: a wrong offset spoils less.
        self._left = [(shard, name) for name in ("tokens", "offsets") for shard in self._shards]
        self._at, self._digest = 0, hashlib.sha256()

    def __call__(self) -> str:
        return self._changed() or self._damaged()

    def _damaged(self) -> str:
        budget = PART
        while self._left and budget > 0:
            shard, name = self._left[0]
            array: StoredArray = getattr(shard, name)
            part = array[self._at : self._at + budget // array.dtype.itemsize]
            self._digest.update(part.data)
            self._at += len(part)
            budget -= part.nbytes
            if self._at == len(array):
                if _differs(shard, name, self._digest.hexdigest()):
                    return _problem(shard, name)
                self._left, self._at, self._digest = self._left[1:], 0, hashlib.sha256()
        return ""

    def _changed(self) -> str:
        for shard in self._shards:
            try:
                if read_header(shard.path) != shard.header:
                    return f"{shard.path}: this shard was prepared again while the run reads it"
                marked = (shard.path / "DONE").stat().st_mtime_ns
                for name in ("tokens", "offsets"):
                    file = shard.path / f"{name}.bin"
                    changed = file.stat().st_mtime_ns
                    if changed > marked and self._sound.get(str(file)) != changed:
                        if _differs(shard, name, fingerprint(file)[1]):
                            return _problem(shard, name)
                        self._sound[str(file)] = changed
            except (OSError, UserError) as error:
                return f"{shard.path}: this shard can no longer be read ({error})"
        return ""


def _differs(shard: Shard, name: str, digest: str) -> bool:
    """Whether a file has another digest; shards of earlier versions have none of their offsets."""
    expected = getattr(shard.header, f"{name}_sha256")
    return bool(expected) and digest != expected


def _problem(shard: Shard, name: str) -> str:
    file = shard.path / f"{name}.bin"
    return f"{file}: changed since it was prepared (SHA-256 differs); prepare it again"
