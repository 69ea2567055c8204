from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import zstandard

from xverse.config import UserError
from xverse.records import read_records
from xverse.texts import (
    ReadReport,
    find_files,
    load_texts,
    read_json,
    read_jsonl,
    read_text,
    read_texts,
    row_text,
    stem,
)


def texts(path: Path, report: ReadReport) -> list[str]:
    rows = read_jsonl(path, report)
    return [text for number, row in rows if (text := row_text(row, number, report)) is not None]


def test_bad_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "first"}',
        b'{"text": "caf\xe9"}',
        '{"text": "你好 🙂"}'.encode(),
        b'{"text": "half a pair \\ud83d"}',
        b'{"text": "cut off',
        b'["a list"]',
        b'{"text": 7}',
        b'{"text": "  "}',
        b"",
        b'{"text": "last"}\r',
    ]
    path = tmp_path / "en.jsonl"
    path.write_bytes(b"\n".join(lines))
    report = ReadReport()
    assert texts(path, report) == ["first", "你好 🙂", "last"]
    assert (report.bad_utf8, report.bad_json, report.no_text, report.not_text, report.empty) == (
        2,
        1,
        1,
        1,
        1,
    )
    assert report.describe() == (
        "6 lines skipped: 2 invalid UTF-8, 1 invalid JSON, 1 without a text, "
        "1 with a number, list or object for the text, 1 empty"
    )
    assert [line for line, _ in report.bad_lines] == [2, 4, 5, 6, 7, 8]
    assert list(read_texts(path, ReadReport())) == [b"first", "你好 🙂".encode(), b"last"]


@pytest.mark.parametrize("damage", ["truncated", "garbled"])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_broken_stream_gives_what_it_holds_and_is_named(tmp_path: Path, damage: str, suffix: str) -> None:
    path = tmp_path / f"en.jsonl{suffix}"
    lines = [b'{"text": "line %d of many"}\n' % i for i in range(20_000)]
    if suffix == ".gz":
        data = gzip.compress(b"".join(lines))
    else:  # several frames: at most a megabyte before the damage is lost
        data = b"".join(zstandard.compress(b"".join(lines)) for _ in range(8))
    half = len(data) // 2
    path.write_bytes(data[:half] if damage == "truncated" else data[:half] + b"\xff" * 40 + data[half + 40 :])
    report = ReadReport()
    assert 0 < len(texts(path, report)) < (20_000 if suffix == ".gz" else 160_000)
    if (
        suffix == ".gz" or damage == "garbled"
    ):  # zstandard's reader takes the end of a file for the end of data
        assert report.describe().startswith(f"broken {'gzip' if suffix == '.gz' else 'zstd'} stream (")
        with pytest.raises(UserError, match=r"en\.jsonl\.\w+: broken \w+ stream"):
            list(read_jsonl(path))


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.json.zst"])
def test_one_reader_for_every_compression(tmp_path: Path, name: str) -> None:
    data = b'\xef\xbb\xbf[{"text": "caf\xc3\xa9"}]'
    packed: dict[str, Any] = {".gz": gzip.compress, ".zst": zstandard.compress}
    path = tmp_path / name
    path.write_bytes(packed.get(path.suffix, bytes)(data))
    assert read_json(path) == [{"text": "café"}]
    assert list(read_records(path)) == [(1, {"text": "café"})]
    assert read_text(path) == data[3:].decode()
    assert stem(path) == "a"


def test_records_are_an_array_or_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert list(read_records(path)) == [(1, {"a": 1}), (3, {"a": 2})]
    path.write_text("")
    assert list(read_records(path)) == []
    path.write_text(' \n[{"a": 1},\n')
    with pytest.raises(UserError, match=r"a\.json: invalid JSON in item 2 \("):
        list(read_records(path, ReadReport()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"f\.json: invalid JSON \(Expecting property name"),
        (b'{"a": "\xff"}', r"f\.json: invalid UTF-8 at byte 7"),
        (b"[" * 100_000, r"f\.json: invalid JSON"),
        (None, r"f\.json: no such file"),
    ],
)
def test_bad_json_is_refused_in_one_wording(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "f.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_json(path)
    lines = tmp_path / "f.jsonl"
    lines.write_bytes(b'{"a": 1}\n{\n')
    with pytest.raises(UserError, match=r"f\.jsonl, line 2: invalid JSON \(Expecting property name"):
        list(read_jsonl(lines))


def test_files_of_texts(tmp_path: Path) -> None:
    for name in ("b.jsonl.gz", "a.txt", "manifest.json", ".c.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in find_files([tmp_path])] == ["a.txt", "b.jsonl.gz"]
    with pytest.raises(UserError, match=r"manifest\.json: expected a \.txt or \.jsonl file"):
        find_files([tmp_path / "manifest.json"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.txt or \.jsonl files in this folder"):
        find_files([tmp_path / "empty"])


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert load_texts(path) == ["one\ntwo\n"]
    assert b"".join(read_texts(path, ReadReport())) == b"one\ntwo\n"
