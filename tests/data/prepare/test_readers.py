from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from xverse.config import UserError
from xverse.data.prepare.inputs import Input, corpus_units, input_units
from xverse.data.prepare.readers import read_unit
from xverse.texts import ReadReport, read_lines

ROWS = [{"text": f"document {i} 文", "lang": "en", "source": "made"} for i in range(40)]


def read(limit: int = 10_000, **given: Any) -> tuple[list[str], ReadReport]:
    report = ReadReport()
    units = input_units([Input(**given)])
    return [document.text for unit in units for document in read_unit(unit, report, limit)], report


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet
    import zstandard

    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines[:500]) + gzip.compress(lines[500:]))
    half = [zstandard.compress(lines[:500]), zstandard.compress(lines[500:])]
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(half))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_text("".join(row["text"] + "\n" for row in ROWS), encoding="utf-8")
    expected = [row["text"] for row in ROWS]
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        assert read(path=str(tmp_path / name))[0] == expected
    assert read(path=str(tmp_path / "e.txt"), lines=True)[0] == expected
    assert read(path=str(tmp_path / "e.txt"))[0] == ["\n".join(expected)]
    assert read(path=str(tmp_path / "?.jsonl*"))[0] == expected * 3
    assert read(path=str(tmp_path))[0] == [*expected * 4, "\n".join(expected)]


def test_a_hugging_face_dataset(tmp_path: Path) -> None:
    for i in range(2):
        rows = "".join(json.dumps({"body": row["text"]}) + "\n" for row in ROWS[i::2])
        (tmp_path / f"train-{i}.jsonl").write_text(rows, encoding="utf-8")
    units = input_units([Input(dataset=str(tmp_path), text_key="body", lang="en")])
    found = [[document.text for document in read_unit(unit, ReadReport(), 1000)] for unit in units]
    assert sorted(found[0] + found[1]) == sorted(row["text"] for row in ROWS)
    with pytest.raises(UserError, match="no column 'text'"):
        list(read_unit(input_units([Input(dataset=str(tmp_path))])[0], ReadReport(), 1000))
    with pytest.raises(UserError, match="dataset"):
        input_units([Input(dataset=str(tmp_path / "nowhere"))])


def test_a_web_archive(tmp_path: Path) -> None:
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    path = tmp_path / "crawl.warc.gz"
    page = "<html><body><nav>menu</nav><article>" + "<p>A sentence about the weather in the hills.</p>" * 8
    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=True)
        http = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.0")
        for body, kind in ((page, "response"), ("not html", "response"), ("plain text", "conversion")):
            headers = (
                http
                if body == page
                else StatusAndHeaders("200 OK", [("Content-Type", "image/png")], "HTTP/1.0")
            )
            record = writer.create_warc_record(
                "http://example.org/",
                kind,
                payload=io.BytesIO(body.encode()),
                http_headers=headers if kind == "response" else None,
            )
            writer.write_record(record)
    texts, report = read(path=str(path))
    assert texts[0].startswith("A sentence about the weather")
    assert texts[1:] == ["plain text"]
    path.write_bytes(path.read_bytes()[:-12])  # in the middle of the last record
    texts, report = read(path=str(path))
    assert len(texts) <= 2
    assert "broken web archive at record" in report.broken_files[0]


def test_what_is_broken_is_listed_with_its_line(tmp_path: Path) -> None:
    good = [json.dumps(row).encode() for row in ROWS[:3]]
    lines = [good[0], b"{", good[1], b'{"text": "\xff"}', b'{"text": "' + b"x" * 20_000 + b'"}', good[2]]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    texts, report = read(path=str(path))
    assert texts == [row["text"] for row in ROWS[:3]]
    assert report.bad_lines == [(2, "invalid JSON"), (4, "invalid UTF-8"), (5, "too long")]
    (tmp_path / "t.txt").write_bytes(b"good\nb\xffd\nagain\n")
    texts, report = read(path=str(tmp_path / "t.txt"))
    assert texts == ["good\nagain"]
    assert report.bad_lines == [(2, "invalid UTF-8")]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst", "a.jsonl.gz"])
def test_broken_files_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no such format" * 50)
    texts, report = read(path=str(tmp_path / name))
    assert texts == []
    assert report.broken_files[0].startswith("broken ")


def test_a_broken_parquet_gives_the_groups_before_the_break(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts, path = [f"text {number}" for number in range(300)], tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=50)
    column = pyarrow.parquet.read_metadata(path).row_group(3).column(0)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    found, report = read(path=str(path))
    assert found == texts[:150]
    assert report.broken_files[0].startswith("broken parquet after row 150 (")


def test_a_huge_line_is_never_held(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(60):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"text": "short"}\n')
    tracemalloc.start()
    report = ReadReport()
    assert [line for _, line in read_lines(path, report, 1_000_000)] == [b'{"text": "short"}\n']
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()
    assert report.bad_lines == [(1, "too long")]


def test_inputs_that_name_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text files here"):
        input_units([Input(path=str(tmp_path / "*.jsonl"))])
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(UserError, match="unknown format; set format"):
        input_units([Input(path=str(tmp_path / "a.bin"))])
    with pytest.raises(UserError, match="unknown format 'jsonlines'; did you mean 'jsonl'"):
        input_units([Input(path=str(tmp_path / "a.bin"), format="jsonlines")])
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="is read twice"):
        input_units([Input(path=str(tmp_path / "a.txt")), Input(path=str(tmp_path))])
    with pytest.raises(ValueError, match="either a path or a dataset"):
        Input()


def test_documents_say_their_language_or_take_the_name_of_the_file(tmp_path: Path) -> None:
    rows = [
        {"text": "first", "lang": "fr", "source": "s"},
        {"text": "second"},
        {"text": "outside", "lang": "../../etc"},
    ]
    (tmp_path / "en.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = ReadReport()
    found = list(read_unit(corpus_units(tmp_path)[0], report, 1000))
    assert [(d.text, d.lang, d.source) for d in found] == [("first", "fr", "s"), ("second", "en", "")]
    assert (report.read, report.bad_lang) == (2, 1)
    assert report.describe() == "1 lines skipped: 1 with an unusable lang"


def test_the_files_of_a_corpus_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such corpus folder"):
        corpus_units(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no \.jsonl or \.jsonl\.gz file"):
        corpus_units(tmp_path)
    for name in ("zh.jsonl.gz", "en.jsonl", "en.jsonl.gz", "manifest.json", ".en.jsonl"):
        (tmp_path / name).write_bytes(b"")
    units = [(unit.name, unit.lang) for unit in corpus_units(tmp_path)]
    assert units == [("en.jsonl", "en"), ("en.jsonl.gz", "en"), ("zh.jsonl.gz", "zh")]
