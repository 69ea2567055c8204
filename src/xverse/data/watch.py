"""Checking that the shards of a run do not change while it reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from xverse.config import UserError
from xverse.data.shards import Shard, read_header


class ShardWatch:
    """A call returns what is wrong with a shard, or an empty string.

    A shard's marker is written after its tokens. Only a token file newer than the marker is read and compared
    with the SHA-256 in the header, so frequent calls are cheap.
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._shards = list(shards)
        self._sound: dict[str, int] = {}  # modification times of files that were verified

    def __call__(self) -> str:
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
                return f"{tokens}: changed since it was prepared (SHA-256 differs); prepare it again"
            self._sound[str(tokens)] = changed
        return ""
