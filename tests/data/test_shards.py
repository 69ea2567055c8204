from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.shards import write_shard
from xverse.config import UserError
from xverse.data.shards import Shard


def test_what_is_written_is_read(make_shard: Callable[..., Shard]) -> None:
    documents = [[5, 100_533, 3], [3], [9, 3]]
    shard = make_shard(documents, "zh")
    assert [shard.document(i).tolist() for i in range(len(shard))] == documents
    assert (shard.tokens.dtype, shard.offsets.dtype) == (np.uint32, np.int64)
    assert (shard.name, shard.header.documents, shard.header.tokens) == ("zh", 3, 6)
    assert len(shard.header.tokens_sha256) == 64


def test_an_unfinished_shard_does_not_count(tmp_path: Path) -> None:
    write_shard(tmp_path / "en", [1, 3], [2], sealed=False)
    with pytest.raises(UserError, match="not a finished token shard"):
        Shard.open(tmp_path / "en")
    write_shard(tmp_path / "en", [2, 3], [2])
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


def test_arrays_are_read_as_numpy_indexes_them(make_shard: Callable[..., Shard]) -> None:
    shard = make_shard([[i, i + 1] for i in range(50)])
    whole = np.fromfile(shard.path / "tokens.bin", "<u4")
    assert np.array_equal(np.asarray(shard.tokens), whole)
    for key in (slice(3, 9), slice(None), slice(90, 200), slice(7, 3), slice(0, 100, 7), slice(5, 60, 3)):
        assert np.array_equal(shard.tokens[key], whole[key]), key
    for numbers in ([], [4], [3, 4, 5, 90, 91, 2, 2, 1]):
        assert np.array_equal(shard.tokens[np.array(numbers, np.int64)], whole[numbers]), numbers
    assert (shard.tokens[0], shard.tokens[-1], len(shard.tokens)) == (0, 50, 100)
    with pytest.raises(IndexError):
        shard.tokens[100]


def test_a_file_that_is_cut_short_while_it_is_read_is_named(make_shard: Callable[..., Shard]) -> None:
    """Of a memory map the process would die by SIGBUS."""
    shard = make_shard([[5] * 3000, [6] * 3000])
    for name, read in (("tokens.bin", lambda: shard.document(1)), ("offsets.bin", lambda: shard.document(0))):
        with (shard.path / name).open("r+b") as file:
            file.truncate(4 if name == "offsets.bin" else 4096)
        with pytest.raises(UserError, match=rf"{name}: ends at byte \d+ of \d+; it was cut short"):
            read()
