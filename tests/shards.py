"""Token shards made on the spot, as ``xverse data prepare`` leaves them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from xverse.data.shards import OFFSET, TOKEN, ShardHeader, seal


def write_shard(
    path: Path, tokens: ArrayLike, lengths: ArrayLike, tokenizer: str = "hash", sealed: bool = True
) -> None:
    """Concatenated documents, ``lengths`` tokens each, in the language that the folder is named after."""
    path.mkdir(parents=True, exist_ok=True)
    values, offsets = np.asarray(tokens, TOKEN), np.append(0, np.cumsum(lengths)).astype(OFFSET)
    values.tofile(path / "tokens.bin")
    offsets.tofile(path / "offsets.bin")
    if sealed:
        seal(path, ShardHeader(tokenizer, path.name, documents=len(offsets) - 1, tokens=len(values)))
