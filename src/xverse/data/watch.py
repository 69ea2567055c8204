"""Checking that the shards of a run do not change while it reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from xverse.config import UserError
from xverse.data.shards import TOKEN, Shard, read_header

PART = 1 << 28


def _differs(tokens: Path) -> str:
    return f"{tokens}: changed since it was prepared (SHA-256 differs); prepare it again"


class ShardWatch:
    """A call returns what is wrong with a shard, or an empty string.

    A shard's marker is written after its tokens. A token file newer than the marker is read and compared with
    the SHA-256 in the header. Each call also reads up to PART bytes of what was not compared yet, so that a
    damaged file with an old time is found, and calls stay cheap.
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._shards = list(shards)
        self._sound: dict[str, int] = {}  # modification times of files that were verified
        self._left = list(self._shards)  # not compared yet, the first one up to ``_at``
        self._at, self._digest = 0, hashlib.sha256()

    def __call__(self) -> str:
        return self._changed() or self._damaged()

    def _damaged(self) -> str:
        budget = PART
        while self._left and budget > 0:
            shard = self._left[0]
            part = shard.tokens[self._at : self._at + budget // TOKEN.itemsize]
            self._digest.update(part.data)
            self._at += len(part)
            budget -= part.nbytes
            if self._at == len(shard.tokens):
                if self._digest.hexdigest() != shard.header.tokens_sha256:
                    return _differs(shard.path / "tokens.bin")
                self._left, self._at, self._digest = self._left[1:], 0, hashlib.sha256()
        return ""

    def _changed(self) -> str:
        for shard in self._shards:
            tokens = shard.path / "tokens.bin"
            try:
                changed = tokens.stat().st_mtime_ns
                if read_header(shard.path) != shard.header:
                    return f"{shard.path}: this shard was prepared again while the run reads it"
                marked = (shard.path / "DONE").stat().st_mtime_ns
                if changed <= marked or self._sound.get(str(tokens)) == changed:
                    continue
                with tokens.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            except (OSError, UserError) as error:
                return f"{shard.path}: this shard can no longer be read ({error})"
            if digest != shard.header.tokens_sha256:
                return _differs(tokens)
            self._sound[str(tokens)] = changed
        return ""
