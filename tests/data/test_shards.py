from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from xverse.config import UserError
from xverse.data.shards import Shard, ShardHeader, ShardWriter


def test_what_is_written_is_read(make_shard: Callable[..., Shard]) -> None:
    documents = [[5, 100_533, 3], [3], [9, 3]]
    shard = make_shard(documents, "zh")
    assert [shard.document(i).tolist() for i in range(len(shard))] == documents
    assert (shard.tokens.dtype, shard.offsets.dtype) == (np.uint32, np.int64)
    assert (shard.name, shard.header.documents, shard.header.tokens) == ("zh", 3, 6)
    assert len(shard.header.tokens_sha256) == 64


def test_an_unfinished_shard_does_not_count_and_is_replaced(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "en", ShardHeader("hash", "en")) as writer:
        writer.add(np.array([1, 3], np.uint32), np.array([2]), 1)
    with pytest.raises(UserError, match="not a finished token shard"):
        Shard.open(tmp_path / "en")
    with ShardWriter(tmp_path / "en", ShardHeader("hash", "en")) as writer:
        writer.add(np.array([2, 3], np.uint32), np.array([2]), 1)
        writer.finish()
    assert Shard.open(tmp_path / "en").tokens[:].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("tokens.bin", b"\0" * 7, "tokens.bin: 7 bytes, expected 8 bytes"),
        ("tokens.bin", None, "tokens.bin: missing, expected 8 bytes"),
        ("offsets.bin", b"\0" * 16, "offsets.bin: damaged"),
        ("header.json", b"{}", "header.json: damaged"),
        ("header.json", b"\xff", "header.json: damaged"),
        ("DONE", b"0", "header.json: damaged"),
    ],
)
def test_damage_is_named(
    make_shard: Callable[..., Shard], name: str, data: bytes | None, message: str
) -> None:
    path = make_shard([[1, 3]]).path
    if data is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        Shard.open(path)


def test_a_shard_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        ShardWriter(tmp_path / "file" / "en", ShardHeader("hash", "en"))
