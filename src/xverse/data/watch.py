"""Whether the shards that a run reads are still what was prepared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from xverse.config import UserError
from xverse.data.shards import Shard, read_header


class ShardWatch:
    """Calling it returns what is wrong with a shard, or an empty string.

    A shard's marker is written after its tokens; only where the tokens' file is newer than the marker is it
    read and compared with the header's SHA-256, so that asking often costs little.
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._shards = list(shards)
        self._sound: dict[str, int] = {}  # modification time of files that were read and are as they were

    def __call__(self) -> str:
        for shard in self._shards:
            tokens = shard.path / "tokens.bin"
            try:
                changed = tokens.stat().st_mtime_ns
                if read_header(shard.path) != shard.header:
                    return f"{shard.path}: this shard was prepared again under the running job"
                marked = (shard.path / "DONE").stat().st_mtime_ns
                if changed <= marked or self._sound.get(str(tokens)) == changed:
                    continue
                with tokens.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            except (OSError, UserError) as error:
                return f"{shard.path}: this shard cannot be read any more ({error})"
            if digest != shard.header.tokens_sha256:
                return f"{tokens}: not what was prepared (its SHA-256 is another); prepare it again"
            self._sound[str(tokens)] = changed
        return ""
