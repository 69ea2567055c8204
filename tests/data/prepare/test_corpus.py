from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from xverse.config import UserError
from xverse.data.prepare.corpus import CorpusReport, corpus_files, read_documents


def test_bad_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "first", "lang": "fr", "source": "s"}',
        b'{"text": "caf\xe9"}',
        '{"text": "你好 🙂"}'.encode(),
        b'{"text": "half a pair \\ud83d"}',
        b'{"text": "cut off',
        b'["a list"]',
        b'{"text": 7}',
        b'{"text": "  "}',
        b"",
        b'{"text": "outside", "lang": "../../etc"}',
        b'{"text": "last"}\r',
    ]
    path = tmp_path / "en.jsonl"
    path.write_bytes(b"\n".join(lines))
    report = CorpusReport()
    found = [(item.text, item.lang, item.source) for item in read_documents(path, report)]
    assert found == [("first", "fr", "s"), ("你好 🙂", "en", ""), ("last", "en", "")]
    assert (report.read, report.bad_utf8, report.bad_json, report.no_text) == (3, 2, 1, 2)
    assert (report.empty, report.bad_lang, report.skipped) == (1, 1, 7)
    assert report.describe() == (
        "7 lines skipped: 2 invalid UTF-8, 1 ill-formed JSON, 2 without a text, "
        "1 with an unusable lang, 1 empty"
    )


@pytest.mark.parametrize("damage", ["truncated", "garbled"])
def test_a_broken_gzip_gives_what_it_holds_and_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "en.jsonl.gz"
    data = gzip.compress(b"".join(b'{"text": "line %d of many"}\n' % i for i in range(20_000)))
    half = len(data) // 2
    path.write_bytes(data[:half] if damage == "truncated" else data[:half] + b"\xff" * 40 + data[half + 40 :])
    report = CorpusReport()
    count = sum(1 for _ in read_documents(path, report))
    assert 0 < count < 20_000
    assert count == report.read
    assert report.describe().startswith("broken gzip stream (")


def test_files_by_stem(tmp_path: Path) -> None:
    for name in ("zh.jsonl.gz", "en.jsonl", "en.jsonl.gz", "manifest.json", ".en.jsonl"):
        (tmp_path / name).write_bytes(b"")
    names = {stem: [path.name for path in paths] for stem, paths in corpus_files(tmp_path).items()}
    assert names == {"en": ["en.jsonl", "en.jsonl.gz"], "zh": ["zh.jsonl.gz"]}


def test_a_missing_folder_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such corpus folder"):
        corpus_files(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no \.jsonl or \.jsonl\.gz file"):
        corpus_files(tmp_path)
